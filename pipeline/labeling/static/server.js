// Requests to the server. A submission is sent again under the same name until the server has answered.

export const RETRY_MS = 3000;
export class Refused extends Error {}

export async function request(path, body) {
  const options = body === undefined ? {} : { method: "POST", headers: { "Content-Type": "application/json" }, body: JSON.stringify(body) };
  const response = await fetch(path, options);
  const answer = await response.json().catch(() => ({ error: `The server answered ${response.status}.` }));
  if (response.status >= 500) throw new Error(answer.error);
  if (!response.ok) throw new Refused(answer.error || `The server answered ${response.status}.`);
  return answer;
}

// The same request again and again, until the server has said yes or no; `complain` is told why each try failed.
export async function insist(path, body, complain) {
  for (;;) {
    try {
      return await request(path, body);
    } catch (error) {
      if (error instanceof Refused) throw error;
      complain(error.message || "No connection.");
      await new Promise((done) => setTimeout(done, RETRY_MS));
    }
  }
}

export function newName() {
  return Array.from(crypto.getRandomValues(new Uint8Array(16)), (byte) => byte.toString(16).padStart(2, "0")).join("");
}

// Saves the newest draft, one request at a time.
export class Drafts {
  constructor(show) {
    this.show = show;
    this.waiting = null;
    this.timer = null;
    this.running = Promise.resolve();
  }
  save(item, draft, delay) {
    this.waiting = { item, draft };
    clearTimeout(this.timer);
    this.timer = setTimeout(() => this.flush(), delay);
  }
  flush() {
    clearTimeout(this.timer);
    const body = this.waiting;
    this.waiting = null;
    if (body === null) return this.running;
    this.running = this.running.then(() => request("/api/draft", body)).then(
      () => this.show("Draft saved"),
      (error) => this.show(error instanceof Refused ? error.message : "Draft NOT saved: no connection"),
    );
    return this.running;
  }
  forget() {
    clearTimeout(this.timer);
    this.waiting = null;
  }
  flushNow() {
    // The page is going away: the browser finishes this request by itself.
    if (this.waiting === null) return;
    fetch("/api/draft", { method: "POST", keepalive: true, headers: { "Content-Type": "application/json" }, body: JSON.stringify(this.waiting) });
    this.waiting = null;
  }
}

// Seconds that the page was in view, for one item.
export class Stopwatch {
  start() {
    this.sum = 0;
    this.since = document.hidden ? null : performance.now();
  }
  visible(shown) {
    if (shown && this.since === null) this.since = performance.now();
    if (!shown && this.since !== null) {
      this.sum += performance.now() - this.since;
      this.since = null;
    }
  }
  seconds() {
    return (this.sum + (this.since === null ? 0 : performance.now() - this.since)) / 1000;
  }
}
