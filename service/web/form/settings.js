/** One setting: which experts act, and how the gate is read (the `experts` and `gate` objects of a request). */

/**
 * @typedef {{experts?: {only?: string[], exclude?: string[], weights?: Record<string, number>},
 *            gate?: Record<string, number>}} Steering
 */

/** The controls of one setting. Their names begin with the prefix, so that a form may hold several. */
export class Setting {
  /**
   * @param {HTMLElement} host
   * @param {string} prefix  "a" to "h"
   * @param {(setting: Setting) => void} onRemove
   */
  constructor(host, prefix, onRemove) {
    const template = /** @type {HTMLTemplateElement} */ (document.getElementById("setting-template"));
    host.replaceChildren(template.content.cloneNode(true));
    this.host = host;
    this.prefix = prefix;
    const remove = /** @type {HTMLButtonElement} */ (host.querySelector("button.remove"));
    remove.hidden = prefix === "a"; // there is always one
    remove.setAttribute("aria-label", `Remove setting ${prefix.toUpperCase()}`);
    remove.addEventListener("click", () => onRemove(this));
    for (const control of this.#named()) control.name = `${prefix}.${control.dataset.name}`;
    this.mode = /** @type {HTMLSelectElement} */ (host.querySelector("select"));
    this.mode.addEventListener("change", () => this.update());
  }

  /** @param {string} title */
  set title(title) {
    /** @type {HTMLElement} */ (this.host.querySelector("legend")).textContent = title;
  }

  /**
   * Makes a checkbox and a weight for each expert.
   * @param {{name: string, description?: string}[]} experts
   */
  setExperts(experts) {
    const [boxes, weights] = this.#dependent();
    boxes.replaceChildren(
      ...experts.map((expert) => this.#labelled(expert, "checkbox", `${this.prefix}.chosen`, expert.name)),
    );
    weights.replaceChildren(
      ...experts.map((expert) => this.#labelled(expert, "number", `${this.prefix}.weight.${expert.name}`, "")),
    );
  }

  /** Shows the controls that the chosen mode needs. */
  update() {
    for (const part of this.#dependent()) {
      part.hidden = !part.dataset.for?.split(" ").includes(this.mode.value);
    }
  }

  /** @returns {Steering} */
  read() {
    /** @type {Steering} */
    const steering = {};
    const experts = this.#readExperts();
    if (experts) steering.experts = experts;
    const gate = this.#named().filter((control) => control.dataset.name?.startsWith("gate.") && control.value !== "");
    if (gate.length) {
      steering.gate = Object.fromEntries(gate.map((control) => [control.name.split(".")[2], Number(control.value)]));
    }
    return steering;
  }

  /** @returns {Steering["experts"]} */
  #readExperts() {
    const [boxes, weights] = this.#dependent();
    const chosen = [...boxes.querySelectorAll("input")].filter((box) => box.checked).map((box) => box.value);
    switch (this.mode.value) {
      case "base":
        return { only: [] };
      case "only":
        return { only: chosen };
      case "exclude":
        return { exclude: chosen };
      case "weights": {
        const given = [...weights.querySelectorAll("input")].filter((input) => input.value !== "");
        const name = (/** @type {HTMLInputElement} */ input) => input.name.slice(`${this.prefix}.weight.`.length);
        return { weights: Object.fromEntries(given.map((input) => [name(input), Number(input.value)])) };
      }
      default:
        return undefined;
    }
  }

  /** @returns {(HTMLInputElement|HTMLSelectElement)[]} */
  #named() {
    return [...this.host.querySelectorAll("[data-name]")].map((control) => /** @type {HTMLInputElement} */ (control));
  }

  /** @returns {HTMLElement[]} */
  #dependent() {
    return [...this.host.querySelectorAll("[data-for]")].map((part) => /** @type {HTMLElement} */ (part));
  }

  /**
   * @param {{name: string, description?: string}} expert
   * @param {string} type
   * @param {string} name
   * @param {string} value
   */
  #labelled(expert, type, name, value) {
    const label = document.createElement("label");
    const input = document.createElement("input");
    Object.assign(input, { type, name, defaultValue: value, step: "any", placeholder: "0" });
    label.className = type === "checkbox" ? "check" : "field";
    label.dataset.tip = [expert.name, expert.description].filter(Boolean).join(": ");
    label.append(...(type === "checkbox" ? [input, ` ${expert.name}`] : [`${expert.name} `, input]));
    return label;
  }
}

/**
 * @param {Steering} steering
 * @returns {string} in a few words
 */
export function describe({ experts, gate }) {
  const parts = [describeExperts(experts)];
  for (const [name, value] of Object.entries(gate ?? {})) parts.push(`gate ${name.replace("_", " ")} ${value}`);
  return parts.join(", ");
}

/** @param {Steering["experts"]} experts */
function describeExperts(experts) {
  if (!experts) return "X-LoRA";
  if (experts.only) return experts.only.length ? `only ${experts.only.join(", ")}` : "base model";
  if (experts.exclude) return experts.exclude.length ? `without ${experts.exclude.join(", ")}` : "X-LoRA";
  const weights = Object.entries(experts.weights ?? {}).map(([name, weight]) => `${name} ${weight}`);
  return `fixed weights: ${weights.join(", ") || "none"}`;
}
