/** A conversation: its turns in the page, and the messages that the next answer is made of. Knows no server. */

/** @typedef {import("./run.js").Run} Run */
/** @typedef {{message: string, run: Run}} Turn */

export class Conversation {
  /**
   * @param {HTMLElement} host
   * @param {{onEdit: (index: number) => void, onRetry: (index: number) => void}} handlers
   */
  constructor(host, handlers) {
    [this.host, this.handlers] = [host, handlers];
    /** @type {Turn[]} */
    this.turns = [];
    /** @type {number|null} the turn that the next message replaces, with all that follow */
    this.editing = null;
  }

  /**
   * @param {string} system
   * @param {number} count  of the turns before
   * @param {string} message
   * @returns {{role: string, content: string}[]}
   */
  messages(system, count, message) {
    const before = this.turns.slice(0, count).flatMap((turn) => [
      { role: "user", content: turn.message },
      { role: "assistant", content: turn.run.text },
    ]);
    return [...(system ? [{ role: "system", content: system }] : []), ...before, { role: "user", content: message }];
  }

  /**
   * Puts a turn in place of one and all that follow it, or at the end.
   * @param {number} index
   * @param {Turn} turn
   */
  put(index, turn) {
    this.turns = [...this.turns.slice(0, index), turn];
    this.editing = null;
    this.render();
  }

  /** Shows the turns; of all but the last the text alone, until asked for more. */
  render() {
    this.host.replaceChildren(
      ...this.turns.map((turn, index) => {
        const item = document.createElement("li");
        const [bubble, buttons] = [document.createElement("p"), document.createElement("div")];
        item.className = "turn";
        item.classList.toggle("replaced", this.editing !== null && index >= this.editing);
        [bubble.className, bubble.textContent] = ["message", turn.message];
        buttons.className = "buttons small";
        const last = index === this.turns.length - 1;
        buttons.append(
          button("Edit", `Edit message ${index + 1}`, () => this.handlers.onEdit(index)),
          button("Retry", `Retry answer ${index + 1}`, () => this.handlers.onRetry(index)),
          ...(last ? [] : [this.#gateButton(turn, index)]),
        );
        turn.run.view.root.classList.toggle("folded", !last);
        item.append(bubble, turn.run.view.root, buttons);
        return item;
      }),
    );
  }

  /**
   * @param {Turn} turn
   * @param {number} index
   */
  #gateButton({ run }, index) {
    const made = button("Show the gate", `Show the gate of answer ${index + 1}`, () => {
      const folded = run.view.root.classList.toggle("folded");
      made.setAttribute("aria-expanded", String(!folded));
    });
    made.setAttribute("aria-expanded", "false");
    return made;
  }
}

/**
 * @param {string} text
 * @param {string} label
 * @param {() => void} onClick
 */
function button(text, label, onClick) {
  const made = document.createElement("button");
  [made.type, made.textContent] = ["button", text];
  made.setAttribute("aria-label", label);
  made.addEventListener("click", onClick);
  return made;
}
