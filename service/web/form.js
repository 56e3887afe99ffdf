/** The form: from its controls to request bodies, and to and from the fragment of a link. */

import { Setting } from "./settings.js";

/** @typedef {HTMLInputElement|HTMLSelectElement|HTMLTextAreaElement} Control */

const NUMBERS = [
  "max_tokens",
  "temperature",
  "top_p",
  "top_k",
  "min_p",
  "repetition_penalty",
  "presence_penalty",
  "frequency_penalty",
  "seed",
  "logprobs",
];
const TABS = ["generate", "scalings"];

export class RequestForm {
  /** @param {HTMLFormElement} form */
  constructor(form) {
    this.form = form;
    this.settings = [
      new Setting(byId("setting-a"), "a", "Setting"),
      new Setting(byId("setting-b"), "b", "Second setting"),
    ];
    this.tab = "generate";
    this.hasExperts = false;
    this.#control("compare").addEventListener("change", () => this.update());
    for (const tab of TABS) byId(`tab-${tab}`).addEventListener("click", () => this.show(tab));
    byId("tab-generate").parentElement?.addEventListener("keydown", (event) => this.#onTabKey(event));
  }

  /** @param {string} tab */
  show(tab) {
    this.tab = tab;
    for (const name of TABS) {
      const button = byId(`tab-${name}`);
      button.setAttribute("aria-selected", String(name === tab));
      button.tabIndex = name === tab ? 0 : -1;
      byId(`panel-${name}`).hidden = name !== tab;
    }
  }

  /** Shows the controls that the present values need. */
  update() {
    byId("setting-b").hidden = !this.comparing;
    for (const setting of this.settings) setting.update();
  }

  /** @param {{name: string, description?: string}[]} experts */
  setExperts(experts) {
    for (const setting of this.settings) setting.setExperts(experts);
    this.hasExperts = experts.length > 0;
  }

  /** @param {string} text */
  set prompt(text) {
    this.#control("prompt").value = text;
  }

  get comparing() {
    return /** @type {HTMLInputElement} */ (this.#control("compare")).checked;
  }

  /**
   * The bodies to send, one per setting, without `stream`.
   * @returns {{path: string, body: Record<string, any>, setting: Setting|null}[]}
   */
  requests() {
    if (this.tab === "scalings") {
      const body = { prompt: this.#control("text").value, return_scalings: "full" };
      return [{ path: "scalings", body, setting: null }];
    }
    const settings = this.comparing ? this.settings : this.settings.slice(0, 1);
    return settings.map((setting) => ({
      path: "generate",
      body: { ...this.#sampling(), ...setting.read() },
      setting,
    }));
  }

  /** @returns {Record<string, any>} */
  #sampling() {
    /** @type {Record<string, any>} */
    const body = { prompt: this.#control("prompt").value };
    for (const name of NUMBERS) {
      const { value } = this.#control(name);
      if (value !== "") body[name] = Number(value);
    }
    const stop = this.#control("stop").value.split("\n").filter(Boolean);
    if (stop.length) body.stop = stop;
    if (/** @type {HTMLInputElement} */ (this.#control("ignore_eos")).checked) body.ignore_eos = true;
    return { ...body, return_scalings: this.#control("return_scalings").value };
  }

  /**
   * Shows what the browser itself finds wrong, such as a number that is none.
   * @returns {boolean} whether there was nothing
   */
  check() {
    const invalid = this.#controls().find((control) => !control.validity.valid && !control.closest("[hidden]"));
    if (!invalid) return true;
    reveal(invalid);
    invalid.reportValidity();
    return false;
  }

  /**
   * Marks the control of the field that the server refused; without one, unmarks all.
   * @param {string|null} param  as in the error
   * @param {string} prefix  of the setting that was refused
   */
  mark(param, prefix) {
    for (const control of this.#controls()) control.removeAttribute("aria-invalid");
    if (!param) return;
    const own = `${prefix}.${param.startsWith("experts") ? "experts" : param}`;
    const refused = this.#controls().find(
      (control) => [param, own].includes(control.name) && !control.closest("[hidden]"),
    );
    if (!refused) return;
    refused.setAttribute("aria-invalid", "true");
    reveal(refused);
  }

  /** @returns {string} everything that differs from the defaults, as a fragment without # */
  fragment() {
    const parts = new URLSearchParams();
    if (this.tab !== "generate") parts.append("tab", this.tab);
    for (const control of this.#controls()) {
      if (isBox(control) ? control.checked : control.value !== defaultOf(control))
        parts.append(control.name, control.value);
    }
    return parts.toString();
  }

  /** @param {string} fragment  what `fragment` returned; unknown names are left out */
  restore(fragment) {
    const parts = new URLSearchParams(fragment);
    this.form.reset();
    for (const control of this.#controls()) {
      if (isBox(control)) control.checked = parts.getAll(control.name).includes(control.value);
      else if (parts.has(control.name)) control.value = parts.get(control.name) ?? "";
    }
    const tab = parts.get("tab") ?? "";
    this.show(TABS.includes(tab) ? tab : "generate");
    this.update();
  }

  /** @param {string} name */
  #control(name) {
    return /** @type {Control} */ (this.form.elements.namedItem(name));
  }

  /** @returns {Control[]} */
  #controls() {
    return [...this.form.elements].map((element) => /** @type {Control} */ (element)).filter((control) => control.name);
  }

  /** @param {KeyboardEvent} event */
  #onTabKey(event) {
    if (!["ArrowLeft", "ArrowRight"].includes(event.key)) return;
    this.show(TABS[1 - TABS.indexOf(this.tab)]);
    byId(`tab-${this.tab}`).focus();
  }
}

/** @param {Control} control */
function reveal(control) {
  const details = control.closest("details");
  if (details) details.open = true;
}

/**
 * @param {Control} control
 * @returns {control is HTMLInputElement}
 */
function isBox(control) {
  return control.type === "checkbox";
}

/** @param {Control} control */
function defaultOf(control) {
  return control instanceof HTMLSelectElement ? control.options[0].value : control.defaultValue;
}

/** @param {string} id */
function byId(id) {
  return /** @type {HTMLElement} */ (document.getElementById(id));
}
