// Text that models and people wrote, shown as text: no markup is ever read from it.

// Characters that steer instead of being seen: controls, and those that change the direction of what follows.
const STEERING = /[\u0000-\u0008\u000b-\u001f\u007f-\u009f\u00ad\u061c\u200b\u200e\u200f\u2028-\u202e\u2060-\u206f\ufeff\ufff9-\ufffb]/;

export function element(tag, attributes = {}, ...children) {
  const made = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (name.startsWith("on")) made.addEventListener(name.slice(2), value);
    else if (typeof value === "boolean") made.toggleAttribute(name, value);
    else made.setAttribute(name, value);
  }
  made.append(...children.filter((child) => child !== null && child !== undefined));
  return made;
}

export function fill(parent, text) {
  // One text node, or several around visible signs for what steers.
  let start = 0;
  for (let match; (match = STEERING.exec(text.slice(start))); ) {
    const at = start + match.index;
    parent.append(text.slice(start, at));
    const code = text.charCodeAt(at).toString(16).toUpperCase().padStart(4, "0");
    parent.append(element("span", { class: "sign" }, `U+${code}`));
    start = at + 1;
    if (parent.childNodes.length > 4000) break; // a text that is nothing else
  }
  parent.append(text.slice(start).replace(new RegExp(STEERING, "g"), "\ufffd"));
}

export function textBlock(text, label) {
  const block = element("div", { class: "text", dir: "auto", tabindex: "0", role: "group", "aria-label": label });
  fill(block, text);
  return block;
}

// A message of a conversation; `note` is what the page says of it.
export function turnOf(message, named) {
  const role = named ? element("div", { class: "role" }, message.role, message.note ? `: ${message.note}` : null) : null;
  return element("div", { class: `turn ${message.role === "assistant" ? "assistant" : ""}` }, role, textBlock(message.content, `${message.role} message`));
}
