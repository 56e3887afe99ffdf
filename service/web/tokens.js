/** The text as a list of tokens, coloured by their leading expert; one of them takes the focus, arrows move it. */

import { colourOf, lineOf } from "./palette.js";
import { sharesOf } from "./gate.js";

/** @typedef {import("./gate.js").Row} Row */

export class TokenList {
  /**
   * @param {HTMLElement} host
   * @param {{onHover: (index: number|null) => void, onFocus: (index: number) => void, onPick: (index: number) => void}} handlers
   */
  constructor(host, handlers) {
    this.host = host;
    this.handlers = handlers;
    /** @type {HTMLElement[]} */
    this.items = [];
    this.current = 0;
    /** @type {number|null} */
    this.picked = null;
    this.#listen();
  }

  /**
   * @param {Row[]} rows
   * @param {string[]} experts
   */
  append(rows, experts) {
    const following = this.host.scrollTop + this.host.clientHeight >= this.host.scrollHeight - 4;
    const fragment = document.createDocumentFragment();
    for (const row of rows) {
      const item = this.#item(row, experts);
      this.items.push(item);
      fragment.append(item);
    }
    this.host.append(fragment);
    if (following) this.host.scrollTop = this.host.scrollHeight;
  }

  /**
   * Makes one token the current one.
   * @param {number} index
   * @param {{focus: boolean}} how
   */
  move(index, { focus }) {
    if (!this.items[index]) return;
    this.items[this.current].tabIndex = -1;
    this.current = index;
    this.items[index].tabIndex = 0;
    if (focus) this.items[index].focus();
    else this.items[index].scrollIntoView({ block: "nearest" });
  }

  /** @param {number} index */
  pick(index) {
    if (this.picked !== null) this.items[this.picked].setAttribute("aria-selected", "false");
    this.picked = index;
    this.items[index].setAttribute("aria-selected", "true");
  }

  /** @param {number} index  where this text leaves the one it is compared with */
  markDivergence(index) {
    this.items[index]?.classList.add("diverges");
  }

  /**
   * @param {Row} row
   * @param {string[]} experts
   */
  #item({ token, weights, lead }, experts) {
    const item = document.createElement("span");
    const share = lead < 0 ? 0 : sharesOf(weights)[lead];
    const least = 1 / Math.max(experts.length, 2);
    item.className = token.text.startsWith("\n") ? "token newline" : token.text ? "token" : "token partial";
    item.textContent = token.text;
    item.role = "option";
    item.tabIndex = this.items.length ? -1 : 0;
    item.dataset.index = String(this.items.length);
    item.setAttribute("aria-selected", "false");
    const leader = lead < 0 ? "no expert" : `${experts[lead]} ${Math.round(share * 100)} percent`;
    item.setAttribute("aria-label", `${spoken(token.text)}, ${leader}`);
    item.style.setProperty("--colour", colourOf(lead));
    item.style.setProperty("--strength", `${lead < 0 ? 0 : 12 + (33 * Math.max(share - least, 0)) / (1 - least)}%`);
    item.style.borderBottomStyle = lineOf(lead);
    return item;
  }

  #listen() {
    const { host, handlers } = this;
    const indexOf = (/** @type {Event} */ event) => {
      const item = event.target instanceof Element ? event.target.closest(".token") : null;
      return item instanceof HTMLElement ? Number(item.dataset.index) : null;
    };
    host.addEventListener("pointerover", (event) => handlers.onHover(indexOf(event)));
    host.addEventListener("pointerleave", () => handlers.onHover(null));
    host.addEventListener("focusin", (event) => {
      const index = indexOf(event);
      if (index === null) return;
      this.move(index, { focus: false });
      handlers.onFocus(index);
    });
    host.addEventListener("click", (event) => {
      const index = indexOf(event);
      if (index !== null) handlers.onPick(index);
    });
    host.addEventListener("keydown", (event) => this.#onKey(event));
  }

  /** @param {KeyboardEvent} event */
  #onKey(event) {
    if (event.ctrlKey || event.metaKey || event.altKey || !this.items.length) return;
    if (event.key === "Enter" || event.key === " ") this.handlers.onPick(this.current);
    else {
      const target = this.#target(event.key);
      if (target === null) return;
      this.move(target, { focus: true });
    }
    event.preventDefault();
  }

  /**
   * @param {string} key
   * @returns {number|null} the token that a key leads to
   */
  #target(key) {
    const last = this.items.length - 1;
    switch (key) {
      case "ArrowLeft":
        return Math.max(this.current - 1, 0);
      case "ArrowRight":
        return Math.min(this.current + 1, last);
      case "ArrowUp":
        return this.#onNextLine(-1);
      case "ArrowDown":
        return this.#onNextLine(1);
      case "Home":
        return 0;
      case "End":
        return last;
      default:
        return null;
    }
  }

  /**
   * @param {1|-1} step
   * @returns {number} the token above or below the current one, or itself
   */
  #onNextLine(step) {
    const from = this.items[this.current];
    let best = this.current;
    let line = null;
    for (let index = this.current + step; this.items[index]; index += step) {
      const { offsetTop, offsetLeft } = this.items[index];
      if (offsetTop === from.offsetTop) continue;
      line ??= offsetTop;
      if (offsetTop !== line) break;
      const better =
        best === this.current ||
        Math.abs(offsetLeft - from.offsetLeft) < Math.abs(this.items[best].offsetLeft - from.offsetLeft);
      if (better) best = index;
    }
    return best;
  }
}

/**
 * @param {string} text
 * @returns {string} what a screen reader can say
 */
function spoken(text) {
  if (text === "") return "no text";
  if (/^\n+$/.test(text)) return "line break";
  return text.trim() || "space";
}
