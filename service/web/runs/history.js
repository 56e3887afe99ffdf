/** The runs of this page, until it is closed or loaded again: any can be shown again, any two compared. */

/** @typedef {import("./run.js").Run} Run */

const MOST = 20; // the oldest go first

export class History {
  /**
   * @param {HTMLElement} host  a details element
   * @param {{show: (run: Run) => void, compare: (runs: [Run, Run]) => void}} handlers
   */
  constructor(host, handlers) {
    this.host = host;
    this.handlers = handlers;
    /** @type {{run: Run, box: HTMLInputElement, item: HTMLElement}[]} newest first */
    this.entries = [];
    /** @type {typeof this.entries} in the order they were picked */
    this.picked = [];
    this.list = /** @type {HTMLElement} */ (host.querySelector("ol"));
    this.button = /** @type {HTMLButtonElement} */ (host.querySelector("button"));
    this.button.addEventListener("click", () => {
      const [first, second] = this.picked;
      handlers.compare([first.run, second.run]);
    });
    this.#update();
  }

  /** @param {Run} run  one that has ended with some text */
  add(run) {
    const item = document.createElement("li");
    const [label, box, show] = [
      document.createElement("label"),
      document.createElement("input"),
      document.createElement("button"),
    ];
    const { title, view } = run;
    const count = view.text.answer.length;
    const about = `${new Date().toTimeString().slice(0, 8)} · ${title} · ${count} tokens`;
    const said = promptOf(run).trim().slice(0, 60);
    [box.type, label.className, show.type, show.className] = ["checkbox", "check", "button", "past"];
    box.setAttribute("aria-label", `Compare: ${about}`);
    show.textContent = about;
    show.append(Object.assign(document.createElement("small"), { textContent: said }));
    const entry = { run, box, item };
    box.addEventListener("change", () => this.#pick(entry));
    show.addEventListener("click", () => this.handlers.show(run));
    label.append(box);
    item.append(label, show);
    this.list.prepend(item);
    this.entries.unshift(entry);
    for (const old of this.entries.splice(MOST)) {
      old.item.remove();
      this.picked = this.picked.filter((one) => one !== old);
    }
    this.#update();
  }

  /** @param {typeof this.entries[number]} entry */
  #pick(entry) {
    this.picked = this.picked.filter((one) => one !== entry);
    if (entry.box.checked) this.picked.push(entry);
    for (const old of this.picked.splice(0, Math.max(this.picked.length - 2, 0))) old.box.checked = false;
    this.#update();
  }

  #update() {
    this.host.hidden = this.entries.length === 0;
    /** @type {HTMLElement} */ (this.host.querySelector("summary")).textContent = `History (${this.entries.length})`;
    this.button.disabled = this.picked.length !== 2;
  }
}

/**
 * @param {Run} run
 * @returns {string} its prompt, or the last message of a chat
 */
function promptOf({ body, written }) {
  if (written && "messages" in written) return String(Object(written.messages.at(-1)).content);
  return String(body.prompt);
}
