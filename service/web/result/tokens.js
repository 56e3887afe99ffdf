/** The text as a list of tokens in colours; one of them takes the focus, arrows move it. Scrolls itself, never the page. */

/**
 * @typedef {import("../gate/gate.js").Row} Row
 * @typedef {import("../gate/colouring.js").Paint} Paint
 */

const STRONGEST = 45; // percent of a colour behind a token: its text stays readable in both themes
const DIMMED = 0.5; // of the prompt's

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
    this.first = 0; // of those that are shown
    this.current = 0;
    /** @type {number|null} */
    this.picked = null;
    /** @type {number|null} */
    this.active = null;
    this.#listen();
  }

  /**
   * @param {Row[]} rows
   * @param {boolean} prompt  whether they are the prompt's
   */
  append(rows, prompt) {
    const following = this.host.scrollTop + this.host.clientHeight >= this.host.scrollHeight - 4;
    const fragment = document.createDocumentFragment();
    for (const { token } of rows) {
      const item = document.createElement("span");
      item.className = token.text.startsWith("\n") ? "token newline" : token.text ? "token" : "token partial";
      item.classList.toggle("prompt", prompt);
      item.textContent = token.text;
      item.role = "option";
      item.tabIndex = -1;
      item.dataset.index = String(this.items.length);
      item.setAttribute("aria-selected", "false");
      this.items.push(item);
      fragment.append(item);
    }
    this.host.append(fragment);
    if (following) this.host.scrollTop = this.host.scrollHeight;
  }

  /**
   * @param {number} index
   * @param {Paint} paint
   * @param {string} spoken  what a screen reader says beside the text
   */
  paint(index, { colour, strength, line }, spoken) {
    const item = this.items[index];
    const most = item.classList.contains("prompt") ? STRONGEST * DIMMED : STRONGEST;
    item.style.setProperty("--colour", colour);
    item.style.setProperty("--strength", `${most * strength}%`);
    item.style.borderBottomStyle = line;
    item.setAttribute("aria-label", `${inWords(item.textContent ?? "")}, ${spoken}`);
  }

  /** @param {number} first  the first that is shown */
  begin(first) {
    this.first = first;
    this.host.classList.toggle("answer-only", first > 0);
    const old = this.items[this.current];
    if (old) old.tabIndex = -1;
    this.current = Math.max(this.current, first);
    if (this.items[this.current]) this.items[this.current].tabIndex = 0;
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
    if (focus) this.items[index].focus({ preventScroll: true });
    this.reveal(index);
  }

  /** @param {number|null} index  the one that something points at */
  mark(index) {
    if (this.active !== null) this.items[this.active]?.classList.remove("active");
    this.active = index;
    if (index !== null) this.items[index]?.classList.add("active");
  }

  /** @param {number} index  scrolls the text, not the page, until the token is in view */
  reveal(index) {
    const { host } = this;
    const { offsetTop: top, offsetHeight: height } = this.items[index];
    if (top < host.scrollTop) host.scrollTop = top - height;
    else if (top + height > host.scrollTop + host.clientHeight) host.scrollTop = top + 2 * height - host.clientHeight;
  }

  /** @param {number} index */
  pick(index) {
    if (this.picked !== null) this.items[this.picked].setAttribute("aria-selected", "false");
    this.picked = index;
    this.items[index].setAttribute("aria-selected", "true");
  }

  /** @param {Iterable<number>} indices  where this text differs from the one it is compared with */
  markDifferences(indices) {
    for (const index of indices) {
      const item = this.items[index];
      item?.classList.add("differs");
      item?.setAttribute("aria-description", "differs");
    }
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
      if (index === null) return;
      this.move(index, { focus: true });
      handlers.onPick(index);
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
        return Math.max(this.current - 1, this.first);
      case "ArrowRight":
        return Math.min(this.current + 1, last);
      case "ArrowUp":
        return this.#onNextLine(-1);
      case "ArrowDown":
        return this.#onNextLine(1);
      case "Home":
        return this.first;
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
    for (let index = this.current + step; index >= this.first && this.items[index]; index += step) {
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
function inWords(text) {
  if (text === "") return "no text";
  if (/^\n+$/.test(text)) return "line break";
  return text.trim() || "space";
}
