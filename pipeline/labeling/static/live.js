// The chat's part of the labeler's page: the conversation, the question, and the answers while they are written.
import { RETRY_MS, insist, newName, request } from "./server.js";
import { element, fill, turnOf } from "./text.js";

const POLL_MS = 500;
const at = (id) => document.getElementById(id);
const wait = (ms) => new Promise((done) => setTimeout(done, ms));

export class Live {
  // load: shows what the server has. complain: says what went wrong.
  constructor(load, complain) {
    this.load = load;
    this.complain = complain;
    this.visit = 0; // raised when the page shows something else: polls of an earlier visit end
    this.shown = []; // messages in the page
    this.sending = false;
  }

  leave() {
    this.visit++;
    at("chat-status").textContent = "";
  }

  // Appends what is new, so that a screen reader reads only that; anything else is shown anew.
  showConversation(messages) {
    const log = at("prompt");
    at("writing")?.remove();
    const same = this.shown.length > 0 && messages.length >= this.shown.length && this.shown.every((text, n) => text === JSON.stringify(messages[n]));
    if (!same) log.replaceChildren(element("h2", { id: "prompt-heading" }, "Conversation"));
    log.append(...messages.slice(same ? this.shown.length : 0).map((message) => turnOf(message, true)));
    this.shown = messages.map((message) => JSON.stringify(message));
  }

  show(work) {
    const chat = work.chat;
    if (chat.problem) this.complain(chat.problem);
    if (chat.state === "waiting") this.follow(chat);
    if (chat.state === "full") at("chat-status").textContent = "This conversation has all its turns. Begin a new one.";
    if (chat.state === "ask") at("question").focus({ preventScroll: true });
    else document.activeElement?.blur?.();
    if (chat.state === "choose") {
      at("chat-status").textContent = "Two answers: compare them, and the conversation goes on from the better one.";
      at("chat-status").scrollIntoView();
    } else scrollTo(0, document.body.scrollHeight);
  }

  // The text of a question is kept in this window until it is sent.
  questionBox(chat, send) {
    const name = `question-${chat.conversation}-${chat.number}`;
    const left = chat.left === 1 ? "the last one of this conversation" : `${chat.left} questions left`;
    const field = element("textarea", {
      id: "question", rows: "2", dir: "auto", "aria-describedby": "question-hint", oninput: () => sessionStorage.setItem(name, field.value),
      onkeydown: (event) => {
        if (event.key !== "Enter" || event.shiftKey || event.ctrlKey || event.metaKey || event.isComposing) return;
        event.preventDefault();
        event.stopPropagation();
        send();
      },
    });
    field.value = sessionStorage.getItem(name) ?? chat.question ?? "";
    return element("div", { class: "write" }, element("label", { for: "question" }, "Your question "), element("kbd", { "aria-hidden": "true" }, "W"), field,
      element("p", { id: "question-hint", class: "soft" }, `Enter sends, Shift and Enter begin a new line; ${left}.`));
  }

  // Sends the question, under one name, until the server has said yes or no.
  async ask(chat) {
    const text = at("question").value;
    if (this.sending || !text.trim()) return text.trim() ? undefined : this.complain("Write a question first.");
    this.sending = at("question").disabled = true;
    this.complain("");
    const body = { conversation: chat.conversation, number: chat.number, request: newName(), text };
    try {
      await this.insist("/api/ask", body);
      sessionStorage.removeItem(`question-${chat.conversation}-${chat.number}`);
    } catch (error) {
      this.complain(error.message);
      at("question").disabled = false;
      this.sending = false;
      return;
    }
    this.sending = false;
    this.load();
  }

  async renew(chat) {
    try {
      await this.insist("/api/new", { conversation: chat.conversation });
      this.load();
    } catch (error) {
      this.complain(error.message);
    }
  }

  insist(path, body) {
    return insist(path, body, (why) => this.complain(`${why} Trying again; keep this page open.`));
  }

  // Shows an answer while it is written, and loads the page's state when all are.
  async follow(chat) {
    const visit = this.visit;
    const text = element("div", { class: "text", dir: "auto" });
    at("prompt").append(element("div", { id: "writing", class: "turn assistant writing", "aria-busy": "true" }, element("div", { class: "role" }, "assistant"), text));
    let written = "";
    for (;;) {
      let progress = null;
      try {
        progress = await request(`/api/progress/${chat.turn}`);
        this.complain("");
      } catch (error) {
        this.complain(`No answer from the server (${error.message}). Trying again…`);
      }
      if (visit !== this.visit) return;
      if (progress && !progress.waiting) return this.load();
      if (progress) {
        if (!progress.text.startsWith(written)) { text.replaceChildren(); written = ""; }
        fill(text, progress.text.slice(written.length));
        written = progress.text;
        at("chat-status").textContent = progress.ahead ? `Waiting: ${progress.ahead} before you.` : chat.compared ? "Two answers are being written; both will appear together." : "The answer is being written.";
      }
      await wait(progress ? POLL_MS : RETRY_MS);
      if (visit !== this.visit) return;
    }
  }
}
