// The chat page: it holds the conversation, sends it with each question, and shows answers while they are written.
import { element, fill } from "/static/text.js";

const names = JSON.parse(document.body.dataset.names);
const at = (id) => document.getElementById(id);
const ENDINGS = { length: "cut off at its longest", interrupted: "stopped" };
let messages = []; // the turns so far; of two answers, the chosen one
let asked = ""; // the last question
let working = null; // of the answer that is being written

function complain(text) {
  at("message").textContent = text;
  at("message").hidden = !text;
}

function enable() {
  at("send").hidden = working !== null;
  at("stop").hidden = working === null;
  at("retry").disabled = working !== null || !asked;
  at("new").disabled = working !== null;
}

// ------------------------------------------------------------------------------------------------ from the server

async function* lines(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) return;
    const parts = (rest + value).split("\n");
    rest = parts.pop();
    for (const part of parts) yield JSON.parse(part);
  }
}

// Shows the answer of a model in its card while it comes; returns its text.
async function answer(model, dialogue, card) {
  const seed = crypto.getRandomValues(new Uint32Array(1))[0];
  const options = { method: "POST", headers: { "Content-Type": "application/json" }, body: JSON.stringify({ model, seed, messages: dialogue }), signal: working.signal };
  let text = "", ended = "broken";
  card.root.classList.add("writing");
  try {
    const response = await fetch("/api/answer", options);
    if (!response.ok) throw new Error((await response.json().catch(() => ({}))).error || `The server answered ${response.status}.`);
    for await (const line of lines(response)) {
      if (line.text) { text += line.text; fill(card.text, line.text); }
      ended = line.ended ?? ended;
    }
    if (ended === "broken") throw new Error("The answer ended early; look at the terminal where the server runs.");
  } catch (error) {
    if (!working.signal.aborted) throw error;
    ended = "interrupted";
  } finally {
    card.root.classList.remove("writing");
  }
  card.note.textContent = ENDINGS[ended] ?? "";
  return text;
}

// ------------------------------------------------------------------------------------------------ the conversation

function turnOf(question) {
  const shown = element("div", { class: "text", dir: "auto" });
  fill(shown, question);
  return element("div", { class: "turn" }, element("div", { class: "role" }, "You"), shown);
}

function cardOf(model, choose) {
  const text = element("div", { class: "text", dir: "auto" });
  const note = element("p", { class: "soft" });
  const root = element("article", { class: "answer", "aria-label": `Answer of ${names[model]}` });
  if (names.length > 1) root.append(element("header", {}, element("h2", {}, names[model])));
  root.append(text, note);
  const pick = names.length > 1 ? element("button", { type: "button", "aria-pressed": "false", hidden: true, onclick: choose }, "Go on from this one") : null;
  if (pick) root.append(pick);
  return { root, text, note, pick };
}

// Both models answer, one after the other; the conversation goes on from the first unless the other is chosen.
async function ask(question) {
  if (working || !question.trim()) return;
  complain("");
  working = new AbortController();
  asked = question;
  enable();
  const before = messages;
  const system = at("system").value.trim();
  const dialogue = [...(system ? [{ role: "system", content: system }] : []), ...before, { role: "user", content: question }];
  const texts = [];
  const choose = (model) => {
    const written = texts[model].trim() !== "";
    messages = written ? [...before, { role: "user", content: question }, { role: "assistant", content: texts[model] }] : before;
    cards.forEach((card, i) => { card.pick?.setAttribute("aria-pressed", String(i === model)); card.root.classList.toggle("better", cards.length > 1 && i === model); });
    if (!written) complain("An empty answer is not part of the conversation.");
  };
  const cards = names.map((_, model) => cardOf(model, () => choose(model)));
  const turn = element("div", { class: "exchange" }, turnOf(question), element("div", { class: "pair" }, ...cards.map((card) => card.root)));
  document.querySelectorAll("#log .answer button").forEach((button) => { button.disabled = true; });
  at("log").append(turn);
  turn.scrollIntoView({ block: "end" });
  try {
    for (const [model, card] of cards.entries()) texts.push(await answer(model, dialogue, card));
    cards.forEach((card) => { if (card.pick) card.pick.hidden = false; });
    choose(0);
  } catch (error) {
    complain(error.message || "No answer from the server.");
    messages = before;
    turn.remove();
    if (!at("question").value) at("question").value = question;
  }
  working = null;
  enable();
  turn.scrollIntoView({ block: "end" });
  at("question").focus();
}

function send() {
  const question = at("question").value;
  if (working || !question.trim()) return;
  at("question").value = "";
  ask(question);
}

function retry() {
  if (working || !asked) return;
  const last = messages.at(-2);
  if (last?.content === asked) messages = messages.slice(0, -2);
  at("log").lastElementChild?.remove();
  ask(asked);
}

at("ask").addEventListener("submit", (event) => { event.preventDefault(); send(); });
at("question").addEventListener("keydown", (event) => {
  if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
  event.preventDefault();
  send();
});
at("stop").addEventListener("click", () => working?.abort());
at("retry").addEventListener("click", retry);
at("new").addEventListener("click", () => { messages = []; asked = ""; at("log").replaceChildren(); complain(""); enable(); at("question").focus(); });
enable();
