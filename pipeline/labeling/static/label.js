// The labeler's page: one item at a time.
import { LETTERS, aboutAnswer, answerFrom, choiceOf, comparison, lanes, setChoice, writing } from "./form.js";
import { Drafts, RETRY_MS, Refused, Stopwatch, insist, newName, request } from "./server.js";
import { Live } from "./live.js";
import { element, textBlock, turnOf } from "./text.js";

const settings = JSON.parse(document.body.dataset.settings);
const at = (id) => document.getElementById(id);
const drafts = new Drafts((text) => { at("saved").textContent = text; });
const watch = new Stopwatch();
let work = { item: null, responses: [] }; // what the server gave
let answer = answerFrom(null, 0); // what the page holds
let current = 0; // the answer that keys are about
let history = []; // own labels, the newest first
let place = -1; // in `history`; -1: new work
let busy = 0; // what runs with the server; the page waits for it
const live = at("new") ? new Live(() => load(), complain) : null; // a chat with a model

const count = () => work.responses.length;
const comparing = () => count() === 2;
const fixed = (label) => Boolean(label?.exported || label?.went_on);
const locked = () => busy > 0 || work.item === null || fixed(work.label);
const asking = () => work.chat?.state === "ask";

function complain(text) {
  at("message").textContent = text;
  at("message").hidden = !text;
}

// ---------------------------------------------------------------------------------------------- from and to the server

async function load(item) {
  complain("");
  busy++;
  live?.leave();
  await drafts.flush();
  try {
    const [next, own] = await Promise.all([request(item ? `/api/item?item=${item}` : "/api/item"), request("/api/history")]);
    history = own.labels;
    place = item ? history.findIndex((label) => label.item === item) : -1;
    show(next);
  } catch (error) {
    complain(error instanceof Refused ? error.message : `No answer from the server (${error.message}). Trying again…`);
    if (!(error instanceof Refused)) setTimeout(() => load(item), RETRY_MS);
  }
  busy--;
  enable();
}

// Sends one submission, under one name, until the server has said yes or no.
async function send(path, body) {
  busy++;
  drafts.forget();
  enable();
  const submission = { ...body, item: work.item, request: newName(), seconds: watch.seconds(), replaces: work.label?.id ?? 0 };
  at("saved").textContent = "Saving…";
  await drafts.running; // a draft that arrived after the label would count as a change of it
  try {
    await insist(path, submission, (why) => complain(`${why} Not saved yet; trying again. Keep this page open.`));
  } catch (error) {
    complain(error.message);
    at("saved").textContent = "NOT saved";
    busy--;
    return enable();
  }
  at("saved").textContent = "Saved";
  await load();
  busy--;
  enable();
}

function submit() {
  if (asking() && !busy) return live.ask(work.chat);
  if (locked()) return;
  const problem = missing();
  if (problem) return complain(problem);
  send("/api/label", { answer });
}

function missing() {
  if (count() === 0) return answer.response.trim() ? "" : "Write an answer, or skip this one.";
  if (comparing() && choiceOf(answer) === null) return "Choose A, B or a tie first.";
  if (comparing() && settings.strength && "ab".includes(choiceOf(answer)) && answer.strength === null) return "Say how much better it is: 1 to 4.";
  if (answer.ranks.filter((rank) => rank !== null).length < 2) return "Rank at least two answers, or skip this one.";
  return "";
}

async function undo() {
  const label = place >= 0 ? history[place] : history[0];
  if (busy || !label) return;
  try {
    await drafts.flush();
    await request("/api/undo", { label: label.id });
    await load();
    at("saved").textContent = "Undone";
  } catch (error) {
    complain(error.message);
  }
}

function turn(step) {
  const next = Math.min(place + step, history.length - 1);
  if (busy || next === place || next < -1) return;
  load(next < 0 ? undefined : history[next].item);
}

// ---------------------------------------------------------------------------------------------- showing

function show(next) {
  const changed = next.item !== work.item || next.label?.id !== work.label?.id;
  work = { responses: [], ...next };
  answer = answerFrom(work.draft ?? work.label?.answer, count());
  current = 0;
  watch.start();
  at("progress").textContent = `${work.done.toLocaleString("en")} done`;
  at("empty").hidden = work.item !== null || live !== null;
  at("prompt").hidden = at("form").hidden = work.item === null && live === null;
  at("notice").textContent = note();
  showPrompt();
  showAnswers();
  showForm();
  if (work.chat) live.show(work);
  else if (changed) scrollTo(0, 0);
}

function note() {
  if (!work.label) return "";
  if (work.label.exported) return "Your label was exported and can only be read.";
  if (work.label.went_on) return "The conversation has gone on or ended since this choice; it can only be read.";
  if (work.label.kind === "skip") return `You skipped this one: ${work.label.reason}. You can still judge it.`;
  return work.draft ? "You changed this label and have not saved the change." : "This is your label; you can change it and save it again.";
}

function showPrompt() {
  if (live) return live.showConversation(work.prompt);
  if (work.item === null) return at("prompt").replaceChildren();
  const several = work.prompt.length > 1;
  at("prompt").replaceChildren(element("h2", { id: "prompt-heading" }, several ? "Conversation" : "Prompt"), ...work.prompt.map((message) => turnOf(message, several)));
}

function showAnswers() {
  const cards = work.responses.map((text, number) =>
    element("article", { class: "answer", id: `answer-${number}`, "aria-labelledby": `heading-${number}` },
      element("header", {}, element("h2", { id: `heading-${number}` }, `Answer ${LETTERS[number]}`)),
      textBlock(text, `Text of answer ${LETTERS[number]}`), work.notes?.[number] ? element("p", { class: "soft" }, work.notes[number]) : null, ...aboutAnswer(answer, number, settings, changed)));
  cards.forEach((card, number) => card.addEventListener("focusin", () => { current = number; mark(); }));
  at("answers").replaceChildren(...cards);
}

function showForm() {
  if (asking()) at("form").replaceChildren(live.questionBox(work.chat, submit));
  else if (work.item === null) at("form").replaceChildren();
  else {
    const parts = comparing() ? comparison(answer, settings, changed) : count() ? [lanes(answer, changed)] : [];
    if (!count() || settings.better_answer) parts.push(writing(answer, !count(), settings, changed));
    at("form").replaceChildren(...parts);
  }
  mark();
  enable();
}

// Signs of the answer's state outside of its own inputs.
function mark() {
  const best = Math.min(...answer.ranks.filter((rank) => rank !== null));
  answer.ranks.forEach((rank, number) => {
    at(`answer-${number}`).classList.toggle("better", comparing() ? choiceOf(answer) === "ab"[number] : rank !== null && rank === best);
    at(`answer-${number}`).classList.toggle("current", !comparing() && number === current);
    for (const input of document.querySelectorAll(`#ranks-${number} input`)) input.checked = input.value === String(rank ?? "");
  });
}

function enable() {
  for (const input of document.querySelectorAll("#answers input, #form input, #form textarea:not(#question), .chip")) input.disabled = locked();
  const strength = at("strength");
  if (strength) for (const input of strength.querySelectorAll("input")) input.disabled = locked() || !["a", "b"].includes(choiceOf(answer));
  at("skip").disabled = locked();
  at("submit").disabled = asking() ? busy > 0 : locked();
  if (live) at("new").disabled = busy > 0 || !["ask", "full"].includes(work.chat?.state) || work.chat.number === 1;
  at("back").disabled = busy > 0 || place + 1 >= history.length;
  at("forward").disabled = busy > 0 || place < 0;
  at("undo").disabled = busy > 0 || !history.length || fixed(place >= 0 ? history[place] : history[0]);
  at("submit").firstChild.textContent = asking() ? "Send " : place >= 0 ? "Save change " : "Save ";
}

function changed(typing = false) {
  complain("");
  drafts.save(work.item, answer, typing ? 400 : 0);
  if (!typing && !comparing() && count()) {
    const focused = document.activeElement?.id;
    at("lanes").replaceWith(lanes(answer, changed));
    if (focused) at(focused)?.focus();
  }
  mark();
  enable();
}

// ---------------------------------------------------------------------------------------------- skipping and keys

function openSkip() {
  if (locked()) return;
  at("skip-form").reset();
  at("skip-reasons").replaceChildren(element("div", { class: "choices" }, ...settings.skip_reasons.map((reason, number) => {
    const input = element("input", { type: "radio", name: "reason", value: reason });
    input.checked = number === 0;
    return element("label", {}, input, reason);
  })));
  at("skipping").showModal();
  at("skip-reasons").querySelector("input")?.focus();
}

at("skipping").addEventListener("close", () => {
  const chosen = at("skip-form").querySelector("input[name=reason]:checked")?.value;
  const reason = at("skip-other").value.trim() || chosen;
  if (at("skipping").returnValue === "skip" && reason) send("/api/skip", { reason });
});
at("skip-form").addEventListener("keydown", (event) => {
  if (event.key === "Enter" && event.target.tagName === "INPUT") { event.preventDefault(); at("skip-now").click(); }
});

function choose(choice) {
  setChoice(answer, choice);
  showForm();
  changed();
}

function rankCurrent(rank) {
  answer.ranks[current] = rank;
  if (rank !== null && answer.ranks.includes(null)) while (answer.ranks[(current = (current + 1) % count())] !== null);
  changed();
  at(`answer-${current}`).scrollIntoView({ block: "nearest" });
}

function moveCurrent(step) {
  current = (current + step + count()) % count();
  mark();
  at(`answer-${current}`).scrollIntoView({ block: "nearest" });
}

function compareKey(key) {
  const choice = { a: "a", ArrowLeft: "a", b: "b", ArrowRight: "b", t: "tie", "=": "tie", x: settings.both_bad ? "bad" : undefined }[key];
  if (choice) return choose(choice), true;
  if (/^[1-4]$/.test(key) && settings.strength && ["a", "b"].includes(choiceOf(answer))) return (answer.strength = Number(key)), choose(choiceOf(answer)), true;
  return false;
}

function rankKey(key) {
  if (key === "ArrowDown" || key === "j") return moveCurrent(1), true;
  if (key === "ArrowUp" || key === "k") return moveCurrent(-1), true;
  if (/^[1-9]$/.test(key) && Number(key) <= count()) return rankCurrent(Number(key)), true;
  if (key === "0" || key === "-") return rankCurrent(null), true;
  if (/^[a-f]$/.test(key) && key.charCodeAt(0) - 97 < count()) return (current = key.charCodeAt(0) - 97), moveCurrent(0), true;
  return false;
}

function qualityKey(event) {
  const digit = event.shiftKey && /^Digit([1-7])$/.exec(event.code)?.[1];
  if (!digit || !settings.quality || !count()) return false;
  answer.quality[current] = Number(digit);
  const input = at(`quality-${current}`).querySelector(`input[value="${digit}"]`);
  input.checked = true;
  changed();
  return true;
}

const COMMANDS = {
  s: openSkip, u: undo, "[": () => turn(1), "]": () => turn(-1), "?": () => at("keys").showModal(),
  g: () => at("guidelines").innerText.trim() && at("show-guidelines") && at("guidelines").showModal(),
  w: () => (at("response") ?? at("question"))?.focus(),
  n: () => at("new")?.click(),
  f: () => at(`flags-${current}`)?.querySelector("input").focus(),
  q: () => { if (comparing()) moveCurrent(1); at(`quality-${current}`)?.querySelector("input").focus(); },
};

addEventListener("keydown", (event) => {
  const target = event.target;
  if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) { event.preventDefault(); return submit(); }
  if (event.ctrlKey || event.metaKey || event.altKey || event.isComposing || document.querySelector("dialog[open]")) return;
  if (target.matches("textarea, input[type=text]")) { if (event.key === "Escape") target.blur(); return; }
  const button = target.closest("button, a");
  if (event.key === "Enter") { if (!button || button.classList.contains("chip")) { event.preventDefault(); submit(); } return; }
  if (!at("keys-on").checked || event.key === " " || event.key === "Tab") return;
  if (target.matches("input[type=radio]") && event.key.startsWith("Arrow")) return;
  if (target.matches(".text") && ["ArrowUp", "ArrowDown"].includes(event.key) && target.scrollHeight > target.clientHeight) return;
  const done = (!locked() && (qualityKey(event) || (comparing() ? compareKey(event.key) : count() ? rankKey(event.key) : false))) || (COMMANDS[event.key] && (COMMANDS[event.key](), true));
  if (done) event.preventDefault();
});

function keyList() {
  const pairs = [
    ["A B, ← →", "two answers: which one is better"], ["T, X", "tie, both bad"], ["1 – 4", "how much better"],
    ["A – F, ↑ ↓", "several answers: which one the next keys are about"], ["1 – 9", "its rank; equal ranks are ties"], ["0", "not ranked: not compared"],
    ["Shift + 1 – 7", "overall quality"], ["Q, F, W", "go to quality, marks, written answer"], ["Enter, Ctrl + Enter", "save"],
    ...(live ? [["W, N", "go to the question, new conversation"]] : []), ["S, U", "skip, undo"], ["[ ]", "back, forward through your labels"], ["G", "guidelines"],
  ];
  return pairs.flatMap(([keys, text]) => [element("dt", {}, element("kbd", {}, keys)), element("dd", {}, text)]);
}

at("key-list").replaceChildren(...keyList());
at("keys-on").checked = localStorage.getItem("keys") !== "off";
at("keys-on").addEventListener("change", () => localStorage.setItem("keys", at("keys-on").checked ? "on" : "off"));
at("show-keys").addEventListener("click", () => at("keys").showModal());
at("show-guidelines")?.addEventListener("click", () => at("guidelines").showModal());
for (const [id, action] of [["submit", submit], ["skip", openSkip], ["undo", undo], ["new", () => live.renew(work.chat)], ["back", () => turn(1)], ["forward", () => turn(-1)]]) at(id)?.addEventListener("click", action);
at("form").addEventListener("submit", (event) => event.preventDefault());
document.addEventListener("visibilitychange", () => { watch.visible(!document.hidden); if (document.hidden) drafts.flushNow(); });
addEventListener("pagehide", () => drafts.flushNow());
watch.start();
load(Number(new URLSearchParams(location.search).get("item")) || undefined);
