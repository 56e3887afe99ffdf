/** One result: the coloured text, its legend, details and maps. What arrives is shown with the next frame. */

import { paint } from "../gate/colouring.js";
import { GatedText, sharesOf } from "../gate/gate.js";
import { showDetail } from "./detail.js";
import { inksOf } from "./drawing.js";
import { asCsv, asJson, asPng, save } from "./export.js";
import { showFigures } from "./figures.js";
import { HeatMap } from "./heatmap.js";
import { showLegend, showScale } from "./legend.js";
import { layerMap, placeOf, readLayer, readSite, siteMap, tokenMap } from "./maps.js";
import { TokenList } from "./tokens.js";

/**
 * @typedef {import("../gate/gate.js").Token} Token
 * @typedef {import("../gate/gate.js").Scalings} Scalings
 * @typedef {import("./figures.js").Figure} Figure
 * @typedef {{colour: string, group: string, prompt: boolean}} Look  what colours stand for, the rows of the layer map,
 *   whether the prompt is shown
 */

export class ResultView {
  /**
   * @param {string} title
   * @param {object} request  what was asked, for the export
   * @param {Look} look
   * @param {(by: string) => void} onColour  the user wants other colours, in all results
   * @param {GatedText} [text]
   */
  constructor(title, request, look, onColour, text = new GatedText()) {
    const template = /** @type {HTMLTemplateElement} */ (document.getElementById("result-template"));
    const content = /** @type {DocumentFragment} */ (template.content.cloneNode(true));
    this.root = /** @type {HTMLElement} */ (content.firstElementChild);
    [this.title, this.request, this.look, this.onColour, this.text] = [title, request, look, onColour, text];
    this.answer = {};
    /** @type {Figure[]} */
    this.figures = [];
    this.shown = 0; // rows that are in the page
    this.stale = 0; // how many of the first of them have another colour by now
    this.frame = 0;
    /** @type {number|null} */
    this.active = null;
    /** @type {number|null} */
    this.picked = null;
    /** @type {number|null} the token whose details are in the page */
    this.detailed = null;
    this.#part("h2").textContent = title;
    this.root.setAttribute("aria-label", title);
    this.tokens = this.#makeTokens();
    this.map = this.#alongText(".along .chart", "Tokens by experts", () => "");
    this.layers = this.#alongText(".layers .chart", "Tokens by layers", (token, row) =>
      readLayer(this.text, token, row, this.look.group),
    );
    this.sites = this.#makeSites();
    for (const button of this.root.querySelectorAll("[data-export]")) {
      button.addEventListener("click", () => this.#export(/** @type {HTMLElement} */ (button).dataset.export ?? ""));
    }
  }

  /** @param {Token[]} tokens  of the prompt */
  pushPrompt(tokens) {
    this.text.setPrompt(tokens);
    this.#later();
  }

  /**
   * @param {Token[]} tokens
   * @param {Scalings} [scalings]
   */
  push(tokens, scalings) {
    if (this.text.add(tokens, scalings)) this.stale = this.text.prompt;
    this.#later();
  }

  /** @param {Look} look */
  relook(look) {
    this.look = look;
    this.stale = this.shown;
    this.flush();
    if (this.active === null && this.picked === null) this.#activate(null, "");
  }

  /** Shows everything that has arrived. */
  flush() {
    cancelAnimationFrame(this.frame);
    this.frame = 0;
    const { rows, prompt, experts } = this.text;
    const before = this.shown;
    this.tokens.append(rows.slice(before, Math.max(prompt, before)), true);
    this.tokens.append(rows.slice(Math.max(prompt, before)), false);
    this.shown = rows.length;
    this.tokens.begin(this.#first);
    this.#paint(0, Math.min(this.stale, before));
    this.#paint(before, this.shown);
    this.stale = 0;
    this.root.classList.toggle("pending", !experts.length || this.shown === prompt);
    if (!experts.length) return;
    showLegend(this.#part(".legend"), this.text, this.look.colour, this.onColour);
    showScale(this.#part(".scale"), this.text, this.look.colour);
    this.#showMaps();
    if (this.detailed === null && this.shown > prompt) this.#activate(null, "");
  }

  /** @param {Figure[]} figures  in the header, beside the title */
  summarize(figures) {
    this.figures = figures;
    showFigures(this.#part(".summary"), figures);
  }

  /** @param {{message: string, hint: string|null, param: string|null, code: string|null}} error */
  fail({ message, hint, param, code }) {
    const [strong, small] = [document.createElement("strong"), document.createElement("small")];
    strong.textContent = message;
    small.textContent = [param && `field: ${param}`, code && `code: ${code}`].filter(Boolean).join(" · ");
    const box = this.#part(".error");
    box.replaceChildren(strong, ...(hint ? [document.createTextNode(` Hint: ${hint}.`)] : []), small);
    box.hidden = false;
  }

  /** @param {number[]} indices  of tokens after the prompt */
  markDifferences(indices) {
    this.tokens.markDifferences(indices.map((index) => index + this.text.prompt));
  }

  /** @returns {number} index of the first token that is shown */
  get #first() {
    return this.look.prompt ? 0 : this.text.prompt;
  }

  /**
   * @param {number} from
   * @param {number} to  not painted
   */
  #paint(from, to) {
    const { rows } = this.text;
    for (let index = from; index < to; index += 1) {
      this.tokens.paint(index, paint(this.look.colour, this.text, rows[index]), this.#spoken(rows[index]));
    }
  }

  #later() {
    this.frame ||= requestAnimationFrame(() => this.flush());
  }

  /** @param {import("../gate/gate.js").Row} row */
  #spoken({ lead, weights, known }) {
    if (!known) return "the gate is not known";
    return lead < 0 ? "no expert" : `${this.text.experts[lead]} ${Math.round(sharesOf(weights)[lead] * 100)} percent`;
  }

  #showMaps() {
    const first = this.#first;
    const [along, layers] = [this.#part(".along"), this.#part(".layers")];
    along.hidden = this.shown <= first || !this.text.acts;
    layers.hidden = along.hidden || !this.text.rows[this.shown - 1].full;
    if (along.hidden) return;
    this.map.show(tokenMap(this.text, first));
    this.#part(".along .hint").textContent =
      `above, the entropy from 0 to ${this.text.maxEntropy.toFixed(2)} nats; below, each expert's weight, mean over the sites`;
    if (layers.hidden) return;
    this.layers.show(layerMap(this.text, first, this.look));
    this.#part(".layers .hint").textContent = this.#layersHint();
  }

  #layersHint() {
    const { colour } = this.look;
    if (colour === "entropy") return "how undecided the gate is there";
    if (colour.startsWith("expert:")) return `the weight of ${this.text.experts[Number(colour.slice(7))]} there`;
    return "the leading expert there, stronger where its share is larger";
  }

  #makeTokens() {
    return new TokenList(this.#part(".text"), {
      onHover: (index) => this.#activate(index, "text"),
      onFocus: (index) => this.#activate(index, "text"),
      onPick: (index) => this.#pick(index),
    });
  }

  /**
   * A map with a column for each token.
   * @param {string} place
   * @param {string} label
   * @param {(token: number, row: number) => string} read  a cell, in words
   */
  #alongText(place, label, read) {
    const readout = this.#part(`${place.split(" ")[0]} .readout`, true);
    return new HeatMap(this.#part(place), label, {
      onHover: (column, row) => {
        const token = column === null ? null : column + this.#first;
        this.#activate(token, label);
        if (readout) readout.textContent = token === null || row === null ? "" : read(token, row);
      },
      onPick: (column) => this.#pick(column + this.#first),
      onMove: (by) => {
        const from = this.active ?? this.picked ?? (by > 0 ? this.#first - 1 : this.shown);
        this.#activate(Math.min(Math.max(from + by, this.#first), this.shown - 1), "");
      },
    });
  }

  #makeSites() {
    /** @type {HeatMap} */
    const map = new HeatMap(this.#part(".sites .chart"), "Sites by experts", {
      onHover: (site) => this.#readSite(site),
      onPick: (site) => this.#readSite(site),
      onMove: (by) => this.#readSite(Math.min(Math.max((map.marked[0] ?? 0) + by, 0), this.text.sites.length - 1)),
    });
    map.scroller.addEventListener("keydown", (event) => {
      if (event.key === "Escape" && this.picked !== null) this.tokens.move(this.picked, { focus: true });
    });
    return map;
  }

  /**
   * Marks a token in text and maps, and brings it into view in all but the one that the pointer is on.
   * @param {number|null} index  null shows the picked token again, or else the last one
   * @param {string} source  where the pointer is
   */
  #activate(index, source) {
    if (!this.shown) return;
    this.active = index;
    const { experts, maxEntropy, maxWeight, rows, prompt } = this.text;
    this.detailed = index ?? this.picked ?? this.detailed ?? Math.min(prompt, this.shown - 1);
    const place = placeOf(this.text, this.detailed);
    const context = { place, isPrompt: this.detailed < prompt, experts, maxEntropy, scale: maxWeight };
    showDetail(this.#part(".detail"), rows[this.detailed], context);
    this.tokens.mark(source === "text" ? null : index);
    if (index !== null && source !== "text") this.tokens.reveal(index);
    const first = this.#first;
    for (const map of [this.map, this.layers]) {
      map.mark(index === null ? null : index - first, this.picked === null ? null : this.picked - first);
      if (index !== null && source !== map.label) map.reveal(index - first);
    }
  }

  /** @param {number} index */
  #pick(index) {
    this.picked = index;
    this.tokens.pick(index);
    this.#activate(index, "text");
    const figure = this.#part(".sites");
    const { full, token } = this.text.rows[index];
    figure.hidden = full === null || !this.text.acts;
    if (full === null || figure.hidden) return;
    const hint = document.createElement("span");
    [hint.className, hint.textContent] = ["hint", "each adapted module of each layer"];
    const title = `Sites of token ${placeOf(this.text, index)} ${JSON.stringify(token.text)} `;
    this.#part(".sites figcaption").replaceChildren(title, hint);
    this.sites.show(siteMap(this.text, full));
    this.#readSite(this.sites.marked[0] ?? 0);
  }

  /** @param {number|null} site */
  #readSite(site) {
    const full = this.picked === null ? null : this.text.rows[this.picked].full;
    if (site === null || full === null) return;
    this.#part(".sites .readout").textContent = readSite(this.text, full, site);
    this.sites.mark(site, null);
    this.sites.reveal(site);
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
          : await asPng(tokenMap(text, this.#first), look);
    save(blob, `xlora-${this.title.toLowerCase().replace(/[^a-z0-9]+/g, "-")}.${format}`);
  }

  /**
   * @param {string} selector
   * @param {boolean} [optional]
   */
  #part(selector, optional) {
    const found = this.root.querySelector(selector);
    if (!found && !optional) throw new Error(`the template has no ${selector}`);
    return /** @type {HTMLElement} */ (found);
  }
}
