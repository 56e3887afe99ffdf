/** One to eight settings that a prompt is tried under. */

import { Setting } from "./settings.js";

const PREFIXES = [..."abcdefgh"]; // as many as POST /compare takes

export class SettingList {
  /**
   * @param {HTMLElement} host
   * @param {HTMLButtonElement} add
   */
  constructor(host, add) {
    [this.host, this.addButton] = [host, add];
    /** @type {Setting[]} */
    this.all = [];
    /** @type {{name: string, description?: string}[]} */
    this.experts = [];
    add.addEventListener("click", () => this.#added());
    this.reset("a");
  }

  /** @returns {string} the letters of the settings that are there */
  get letters() {
    return this.all.map((setting) => setting.prefix).join("");
  }

  /** @param {string} letters */
  reset(letters) {
    const wanted = PREFIXES.filter((prefix) => letters.includes(prefix) || prefix === "a");
    this.host.replaceChildren();
    this.all = wanted.map((prefix) => this.#make(prefix));
    this.#arrange();
  }

  /** @param {{name: string, description?: string}[]} experts */
  setExperts(experts) {
    this.experts = experts;
    for (const setting of this.all) setting.setExperts(experts);
  }

  /** Shows the controls that the present values need. */
  update() {
    for (const setting of this.all) setting.update();
  }

  /** @param {boolean} alone  whether only the first counts */
  showFirstAlone(alone) {
    this.addButton.hidden = alone || this.all.length === PREFIXES.length;
    this.all.forEach((setting, index) => (setting.host.hidden = alone && index > 0));
  }

  #added() {
    const prefix = PREFIXES.find((one) => !this.letters.includes(one)) ?? "a";
    const made = this.#make(prefix);
    this.all = [...this.all, made].sort((one, other) => one.prefix.localeCompare(other.prefix));
    this.#arrange();
    made.mode.focus();
  }

  /** @param {string} prefix */
  #make(prefix) {
    const host = document.createElement("div");
    host.id = `setting-${prefix}`;
    const setting = new Setting(host, prefix, (one) => this.#remove(one));
    setting.setExperts(this.experts);
    return setting;
  }

  /** @param {Setting} setting */
  #remove(setting) {
    this.all = this.all.filter((one) => one !== setting);
    this.#arrange();
    this.addButton.focus();
  }

  #arrange() {
    this.host.replaceChildren(...this.all.map((setting) => setting.host));
    for (const setting of this.all) {
      setting.title = this.all.length > 1 ? `Setting ${setting.prefix.toUpperCase()}` : "Setting";
      setting.update();
    }
    this.addButton.hidden = this.all.length === PREFIXES.length;
    this.addButton.textContent = this.all.length > 1 ? "Add another setting" : "Add a setting to compare with";
  }
}
