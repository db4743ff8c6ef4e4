// The questions about one item. They read and change `answer`, in the order shown, and call `changed`.
import { element } from "./text.js";

export const LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ";
const STRENGTHS = ["negligibly", "slightly", "clearly", "significantly"];

export function emptyAnswer(count) {
  return { ranks: Array(count).fill(null), strength: null, both_bad: false, quality: Array(count).fill(null), flags: Array.from({ length: count }, () => []), response: "" };
}

// A draft or label as an answer; whatever does not fit is left out.
export function answerFrom(given, count) {
  const answer = emptyAnswer(count);
  if (given === null || typeof given !== "object") return answer;
  for (const name of ["ranks", "quality", "flags"]) if (Array.isArray(given[name]) && given[name].length === count) answer[name] = given[name];
  answer.strength = given.strength ?? null;
  answer.both_bad = given.both_bad === true;
  answer.response = typeof given.response === "string" ? given.response : "";
  return answer;
}

export function choiceOf(answer) {
  const [a, b] = answer.ranks;
  if (a === null || b === null) return null;
  return a < b ? "a" : b < a ? "b" : answer.both_bad ? "bad" : "tie";
}

export function setChoice(answer, choice) {
  answer.ranks = choice === "a" ? [1, 2] : choice === "b" ? [2, 1] : [1, 1];
  answer.both_bad = choice === "bad";
  if (choice === "tie" || choice === "bad") answer.strength = null;
}

function radio(name, value, text, key, checked, onchange) {
  const input = element("input", { type: "radio", name, value: String(value), onchange });
  input.checked = checked;
  return element("label", {}, input, text, key ? element("kbd", { "aria-hidden": "true" }, key) : null);
}

function fieldset(legend, id, ...choices) {
  return element("fieldset", { id }, element("legend", {}, legend), element("div", { class: "choices" }, ...choices));
}

export function comparison(answer, settings, changed) {
  const choices = [["a", "A is better", "A"], ["b", "B is better", "B"], ["tie", "Tie", "T"]];
  if (settings.both_bad) choices.push(["bad", "Both bad", "X"]);
  const choose = (choice) => () => { setChoice(answer, choice); changed(); };
  const parts = [fieldset("Which answer is better?", "choice", ...choices.map(([value, text, key]) => radio("choice", value, text, key, choiceOf(answer) === value, choose(value))))];
  if (settings.strength) {
    const rate = (strength) => () => { answer.strength = strength; changed(); };
    parts.push(fieldset("How much better?", "strength", ...STRENGTHS.map((text, at) => radio("strength", at + 1, text, String(at + 1), answer.strength === at + 1, rate(at + 1)))));
  }
  return parts;
}

export function aboutAnswer(answer, at, settings, changed) {
  const parts = [];
  const name = `Answer ${LETTERS[at]}`;
  const count = answer.ranks.length;
  if (count > 2) {
    const give = (rank) => () => { answer.ranks[at] = rank; changed(); };
    const ranks = [...answer.ranks.keys()].map((n) => radio(`rank-${at}`, n + 1, String(n + 1), "", answer.ranks[at] === n + 1, give(n + 1)));
    parts.push(fieldset(`Rank of ${name}, 1 is best`, `ranks-${at}`, ...ranks, radio(`rank-${at}`, "", "not ranked", "", answer.ranks[at] === null, give(null))));
  }
  if (settings.quality) {
    const rate = (value) => () => { answer.quality[at] = value; changed(); };
    parts.push(fieldset(`Overall quality of ${name}`, `quality-${at}`, ...[1, 2, 3, 4, 5, 6, 7].map((value) => radio(`quality-${at}`, value, String(value), "", answer.quality[at] === value, rate(value)))));
  }
  if (settings.flags.length) {
    const boxes = settings.flags.map((flag) => {
      const input = element("input", { type: "checkbox", onchange: () => {
        answer.flags[at] = settings.flags.filter((other) => (other === flag ? input.checked : answer.flags[at].includes(other)));
        changed();
      } });
      input.checked = answer.flags[at].includes(flag);
      return element("label", {}, input, flag);
    });
    parts.push(fieldset(`${name}: mark what applies`, `flags-${at}`, ...boxes));
  }
  return parts;
}

export function writing(answer, required, settings, changed) {
  const label = required ? "Write the answer" : "Write a better answer, if you like";
  const field = element("textarea", { id: "response", maxlength: String(settings.max_answer_characters), dir: "auto", oninput: () => { answer.response = field.value; changed(true); } });
  field.value = answer.response;
  return element("label", { class: "write" }, label, element("span", { class: "soft" }, " "), element("kbd", { "aria-hidden": "true" }, "W"), field);
}

// One lane per rank and one for what is not ranked; the answers' chips are dragged, or moved with the arrow keys.
export function lanes(answer, changed) {
  const count = answer.ranks.length;
  const board = element("div", { id: "lanes", role: "group", "aria-label": "Ranks: 1 is best; answers in one lane are tied; answers that are not ranked are not compared" });
  for (let rank = 1; rank <= count + 1; rank++) {
    const value = rank > count ? null : rank;
    const lane = element("div", { class: "lane", "data-rank": value ?? "" }, element("b", {}, value === null ? "Not ranked" : rank === 1 ? "1 · best" : String(rank)));
    answer.ranks.forEach((given, at) => { if (given === value) lane.append(chip(answer, at, changed)); });
    board.append(lane);
  }
  return board;
}

function chip(answer, at, changed) {
  const count = answer.ranks.length;
  const rank = answer.ranks[at];
  const move = (value) => { answer.ranks[at] = value; changed(); document.getElementById(`chip-${at}`)?.focus(); };
  const made = element("button", { type: "button", class: "chip", id: `chip-${at}`, "aria-label": `Answer ${LETTERS[at]}, ${rank === null ? "not ranked" : `rank ${rank}`}; arrow keys move it` }, LETTERS[at]);
  made.addEventListener("keydown", (event) => {
    const step = { ArrowUp: -1, ArrowDown: 1 }[event.key];
    if (!step || made.disabled) return;
    event.preventDefault();
    event.stopPropagation();
    const next = (rank ?? count + 1) + step;
    if (next >= 1 && next <= count + 1) move(next > count ? null : next);
  });
  made.addEventListener("pointerdown", (event) => { if (!made.disabled && event.button === 0) drag(made, event, move); });
  return made;
}

function drag(chipButton, start, move) {
  const ghost = chipButton.cloneNode(true);
  let over = null;
  ghost.removeAttribute("id");
  ghost.classList.add("floating");
  const follow = (event) => {
    if (!ghost.isConnected) {
      if (Math.hypot(event.clientX - start.clientX, event.clientY - start.clientY) < 5) return;
      document.body.append(ghost);
      chipButton.classList.add("dragged");
    }
    ghost.style.left = `${event.clientX - 20}px`;
    ghost.style.top = `${event.clientY - 20}px`;
    over?.classList.remove("over");
    over = document.elementFromPoint(event.clientX, event.clientY)?.closest(".lane") ?? null;
    over?.classList.add("over");
  };
  const end = (event) => {
    for (const [name, listener] of [["pointermove", follow], ["pointerup", end], ["pointercancel", end]]) removeEventListener(name, listener);
    const dropped = ghost.isConnected && event.type === "pointerup";
    ghost.remove();
    chipButton.classList.remove("dragged");
    over?.classList.remove("over");
    if (dropped && over) move(over.dataset.rank === "" ? null : Number(over.dataset.rank));
  };
  for (const [name, listener] of [["pointermove", follow], ["pointerup", end], ["pointercancel", end]]) addEventListener(name, listener);
}
