/** The form: from its controls to request bodies, and to and from the fragment of a link. */

import { SettingList } from "./setting_list.js";

/** @typedef {HTMLInputElement|HTMLSelectElement|HTMLTextAreaElement} Control */
/** @typedef {import("./settings.js").Setting} Setting */

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
/** What each tab's main button says. */
const TABS = { generate: "Generate", chat: "Send", scalings: "Show scalings" };

export class RequestForm {
  /** @param {HTMLFormElement} form */
  constructor(form) {
    this.form = form;
    this.tab = "generate";
    this.settings = new SettingList(byId("settings"), /** @type {HTMLButtonElement} */ (byId("add-setting")));
    for (const tab of Object.keys(TABS)) byId(`tab-${tab}`).addEventListener("click", () => this.show(tab));
    byId("tab-generate").parentElement?.addEventListener("keydown", (event) => this.#onTabKey(event));
    for (const change of ["input", "change"]) {
      form.addEventListener(change, ({ target }) => target instanceof Element && target.removeAttribute("aria-invalid"));
    }
  }

  /** @param {string} tab */
  show(tab) {
    this.tab = tab;
    for (const name of Object.keys(TABS)) {
      const button = byId(`tab-${name}`);
      button.setAttribute("aria-selected", String(name === tab));
      button.tabIndex = name === tab ? 0 : -1;
      byId(`panel-${name}`).hidden = name !== tab;
    }
    byId("sampling").hidden = tab === "scalings";
    this.settings.showFirstAlone(tab === "chat");
    byId("run").textContent = TABS[/** @type {keyof TABS} */ (tab)];
    this.mark(null, "");
  }

  /** @param {{name: string, description?: string}[]} experts */
  setExperts(experts) {
    this.settings.setExperts(experts);
  }

  get hasExperts() {
    return this.settings.experts.length > 0;
  }

  /**
   * @param {string} name
   * @param {string} text
   */
  fill(name, text) {
    this.#control(name).value = text;
  }

  /** @param {string} name */
  value(name) {
    return this.#control(name).value;
  }

  /** @returns {Setting[]} those that count */
  get asked() {
    return this.tab === "chat" ? this.settings.all.slice(0, 1) : this.settings.all;
  }

  /** @returns {Record<string, any>} the body of POST /scalings */
  scalings() {
    const likely = /** @type {HTMLInputElement} */ (this.#control("perplexity")).checked;
    return { prompt: this.value("text"), return_scalings: "full", ...(likely ? { perplexity: true } : {}) };
  }

  /**
   * @param {Setting} setting
   * @returns {Record<string, any>} the body of POST /generate without the prompt
   */
  generation(setting) {
    /** @type {Record<string, any>} */
    const body = {};
    for (const name of NUMBERS) {
      const value = this.value(name);
      if (value !== "") body[name] = Number(value);
    }
    const stop = this.value("stop").split("\n").filter(Boolean);
    if (stop.length) body.stop = stop;
    if (/** @type {HTMLInputElement} */ (this.#control("ignore_eos")).checked) body.ignore_eos = true;
    const rows = this.value("scalings_start") === "0" ? { scalings_start: 0 } : {};
    return { ...body, return_scalings: this.value("return_scalings"), ...rows, ...setting.read() };
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
    for (const control of this.#controls()) if (!param) control.removeAttribute("aria-invalid");
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
    if (this.settings.all.length > 1) parts.append("settings", this.settings.letters);
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
    this.settings.reset(parts.get("settings") ?? "a");
    for (const control of this.#controls()) {
      if (isBox(control)) control.checked = parts.getAll(control.name).includes(control.value);
      else if (parts.has(control.name)) control.value = parts.get(control.name) ?? "";
    }
    const tab = parts.get("tab") ?? "";
    this.settings.update();
    this.show(tab in TABS ? tab : "generate");
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
    const by = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
    if (!by) return;
    const names = Object.keys(TABS);
    this.show(names[(names.indexOf(this.tab) + by + names.length) % names.length]);
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
