/** One result: the coloured text, its legend, details and maps. What arrives is shown with the next frame. */

import { showDetail } from "./detail.js";
import { asCsv, asJson, asPng, save } from "./export.js";
import { GatedText } from "./gate.js";
import { HeatMap, inksOf } from "./heatmap.js";
import { colourOf, lineOf, NEUTRAL } from "./palette.js";
import { TokenList } from "./tokens.js";

/**
 * @typedef {import("./gate.js").Token} Token
 * @typedef {import("./gate.js").Scalings} Scalings
 * @typedef {import("./heatmap.js").MapData} MapData
 */

const TICK_TOKENS = 10;

export class ResultView {
  /**
   * @param {string} title
   * @param {object} request  what was asked, for the export
   */
  constructor(title, request) {
    const template = /** @type {HTMLTemplateElement} */ (document.getElementById("result-template"));
    const content = /** @type {DocumentFragment} */ (template.content.cloneNode(true));
    this.root = /** @type {HTMLElement} */ (content.firstElementChild);
    this.title = title;
    this.request = request;
    this.answer = {};
    this.text = new GatedText();
    this.shown = 0; // rows that are in the page
    this.frame = 0;
    /** @type {number|null} */
    this.active = null;
    /** @type {number|null} */
    this.picked = null;
    this.detailed = 0; // the token whose details are in the page
    this.#part("h2").textContent = title;
    this.root.setAttribute("aria-label", title);
    this.tokens = this.#makeTokens();
    this.map = this.#makeMap();
    this.sites = this.#makeSites();
    for (const button of this.root.querySelectorAll("[data-export]")) {
      button.addEventListener("click", () => this.#export(/** @type {HTMLElement} */ (button).dataset.export ?? ""));
    }
  }

  /**
   * @param {Token[]} tokens
   * @param {Scalings} [scalings]
   */
  push(tokens, scalings) {
    this.text.add(tokens, scalings);
    this.frame ||= requestAnimationFrame(() => this.flush());
  }

  /** Shows everything that has arrived. */
  flush() {
    cancelAnimationFrame(this.frame);
    this.frame = 0;
    this.tokens.append(this.text.rows.slice(this.shown), this.text.experts);
    const first = this.shown === 0;
    this.shown = this.text.rows.length;
    this.#showLegend();
    if (!this.shown) return;
    if (first) this.#activate(null);
    this.map.show(this.#tokenMap());
    this.#part(".map .hint").textContent =
      `above, the entropy from 0 to ${this.text.maxEntropy.toFixed(2)} nats; below, the weight of each expert`;
  }

  /** @param {string} summary  in the header, beside the title */
  summarize(summary) {
    this.#part(".summary").textContent = summary;
  }

  /** @param {{message: string, hint: string|null, param: string|null, code: string|null}} error */
  fail({ message, hint, param, code }) {
    const [strong, small] = [document.createElement("strong"), document.createElement("small")];
    strong.textContent = message;
    small.textContent = [param && `field: ${param}`, code && `code: ${code}`].filter(Boolean).join(" · ");
    const box = this.#part(".error");
    box.replaceChildren(strong, ...(hint ? [document.createTextNode(` Hint: ${hint}.`)] : []), small);
    box.hidden = false;
    this.root.classList.toggle("empty", !this.text.rows.length);
  }

  /** @param {number} index */
  markDivergence(index) {
    this.tokens.markDivergence(index);
  }

  #makeTokens() {
    return new TokenList(this.#part(".text"), {
      onHover: (index) => this.#activate(index),
      onFocus: (index) => this.#activate(index),
      onPick: (index) => this.#pick(index),
    });
  }

  #makeMap() {
    return new HeatMap(this.#part(".map .chart"), "Tokens by experts", {
      onHover: (index) => this.#activate(index),
      onPick: (index) => this.#pick(index),
      onMove: (by) => this.#move(by),
    });
  }

  #makeSites() {
    const figure = this.#part(".sites");
    figure.addEventListener("keydown", (event) => {
      if (event.key === "Escape" && this.picked !== null) this.tokens.move(this.picked, { focus: true });
    });
    /** @type {HeatMap} */
    const map = new HeatMap(this.#part(".sites .chart"), "Sites by experts", {
      onHover: (site) => this.#readSite(site),
      onPick: (site) => this.#readSite(site),
      onMove: (by) => this.#readSite(Math.min(Math.max((map.marked[0] ?? 0) + by, 0), this.text.sites.length - 1)),
    });
    return map;
  }

  /** @param {number|null} index  null shows the picked token again, or else the last one */
  #activate(index) {
    this.active = index;
    this.detailed = index ?? this.picked ?? this.detailed;
    const { experts, maxEntropy, maxWeight, rows } = this.text;
    const context = { index: this.detailed, experts, maxEntropy, scale: maxWeight };
    if (this.shown) showDetail(this.#part(".detail"), rows[this.detailed], context);
    this.map.mark(index, this.picked);
  }

  /** @param {number} by */
  #move(by) {
    const index = Math.min(Math.max((this.active ?? this.picked ?? -by) + by, 0), this.shown - 1);
    this.tokens.move(index, { focus: false });
    this.map.reveal(index);
    this.#activate(index);
  }

  /** @param {number} index */
  #pick(index) {
    this.picked = index;
    this.tokens.pick(index);
    this.map.reveal(index);
    this.#activate(index);
    const figure = this.#part(".sites");
    const { full, token } = this.text.rows[index];
    figure.hidden = full === null;
    if (full === null) return;
    const hint = document.createElement("span");
    [hint.className, hint.textContent] = ["hint", "one column per adapted module, in order; the numbers are layers"];
    this.#part(".sites figcaption").replaceChildren(`Sites of token ${index} ${JSON.stringify(token.text)} `, hint);
    this.sites.show(this.#siteMap(full));
    this.#readSite(this.sites.marked[0] ?? 0);
    this.sites.scroller.focus({ preventScroll: true });
    figure.scrollIntoView({ block: "nearest" });
  }

  /** @param {number|null} site */
  #readSite(site) {
    const full = this.picked === null ? null : this.text.rows[this.picked].full;
    if (site === null || full === null) return;
    const { experts, sites } = this.text;
    const weights = experts.map((name, expert) => `${name} ${full[site * experts.length + expert].toFixed(3)}`);
    this.#part(".readout").textContent = `${sites[site]}: ${weights.join(", ")}`;
    this.sites.mark(site, null);
    this.sites.reveal(site);
  }

  /** @returns {MapData} */
  #tokenMap() {
    const { rows, experts, maxEntropy, maxWeight } = this.text;
    return {
      columns: this.shown,
      experts,
      scale: maxWeight,
      weight: (token, expert) => rows[token].weights[expert],
      curve: (token) => {
        const { entropy } = rows[token];
        return entropy === null ? null : entropy / maxEntropy;
      },
      curveLabel: "entropy",
      tick: (token) => (token % TICK_TOKENS ? null : String(token)),
    };
  }

  /**
   * @param {Float32Array} full  [S*E]
   * @returns {MapData}
   */
  #siteMap(full) {
    const { experts, sites } = this.text;
    const layers = sites.map((site) => /\.(\d+)\./.exec(site)?.[1] ?? null);
    return {
      columns: sites.length,
      experts,
      scale: full.reduce((largest, weight) => Math.max(largest, Math.abs(weight)), 1),
      weight: (site, expert) => full[site * experts.length + expert],
      tick: (site) => (site === 0 || layers[site] !== layers[site - 1] ? layers[site] : null),
    };
  }

  #showLegend() {
    const { experts, led, weight, rows, unled } = this.text;
    const share = (/** @type {number} */ count) => `${Math.round((100 * count) / Math.max(rows.length, 1))} %`;
    const entries = experts.map((name, expert) => ({
      name,
      led: share(led[expert]),
      mean: (weight[expert] / Math.max(rows.length, 1)).toFixed(2),
      colour: colourOf(expert),
      line: lineOf(expert),
    }));
    if (unled) entries.push({ name: "no expert", led: share(unled), mean: "", colour: NEUTRAL, line: "none" });
    this.#part(".legend").replaceChildren(...entries.map(legendEntry));
  }

  /** @param {string} format  json, csv or png */
  async #export(format) {
    const map = /** @type {HTMLElement} */ (this.map.canvas);
    const look = { title: this.title, inks: inksOf(map), background: getComputedStyle(this.root).backgroundColor };
    const { text, request, answer } = this;
    const blob =
      format === "json"
        ? asJson(text, { request, answer })
        : format === "csv"
          ? asCsv(text)
          : await asPng(this.#tokenMap(), look);
    save(blob, `xlora-${this.title.toLowerCase().replace(/[^a-z0-9]+/g, "-")}.${format}`);
  }

  /** @param {string} selector */
  #part(selector) {
    return /** @type {HTMLElement} */ (this.root.querySelector(selector));
  }
}

/** @param {{name: string, led: string, mean: string, colour: string, line: string}} entry */
function legendEntry({ name, led, mean, colour, line }) {
  const [item, swatch, small] = ["li", "span", "small"].map((tag) => document.createElement(tag));
  swatch.className = "swatch";
  swatch.style.setProperty("--colour", colour);
  swatch.style.borderBottomStyle = line;
  small.textContent = mean && `mean ${mean}`;
  item.title = `leads ${led} of the tokens${mean && `; mean weight ${mean}`}`;
  item.append(swatch, `${name} `, strong(led), small);
  return item;
}

/** @param {string} text */
function strong(text) {
  const element = document.createElement("strong");
  element.textContent = text;
  return element;
}
