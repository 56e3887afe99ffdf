/** The engine, live: a few of the Prometheus metrics, read again every two seconds while the page is in view. */

const PERIOD_MS = 2000;

/** @typedef {{at: number, values: Map<string, number>}} Sample */

export class LiveStrip {
  /**
   * @param {HTMLElement} host
   * @param {() => Promise<string>} read  Prometheus' text format
   */
  constructor(host, read) {
    this.host = host;
    this.read = read;
    /** @type {Sample|null} */
    this.last = null;
  }

  /** Begins, and never ends. */
  async run() {
    for (;;) {
      if (!document.hidden) await this.#refresh();
      await new Promise((resolve) => setTimeout(resolve, PERIOD_MS));
    }
  }

  async #refresh() {
    try {
      const sample = { at: performance.now(), values: parse(await this.read()) };
      this.#show(sample, this.last ?? sample);
      this.last = sample;
      this.#explain("");
    } catch (error) {
      this.last = null;
      for (const cell of this.host.querySelectorAll("[data-live]:not([data-live=forward])")) cell.textContent = "–";
      this.#explain(`No metrics: ${/** @type {Error} */ (error).message}.`);
    }
  }

  /** @param {number} tokens  of the last answer, per forward pass */
  showLast(tokens) {
    this.#set("forward", tokens.toFixed(2));
  }

  /** @param {string} reason  why there are no figures */
  #explain(reason) {
    for (const figure of this.host.querySelectorAll("button")) {
      const { meaning = figure.dataset.tip ?? "" } = figure.dataset;
      figure.dataset.meaning = meaning;
      figure.dataset.tip = [reason, meaning].filter(Boolean).join(" ");
    }
  }

  /**
   * @param {Sample} now
   * @param {Sample} before
   */
  #show(now, before) {
    const value = (/** @type {string} */ name) => now.values.get(`xlora_${name}`) ?? 0;
    const grown = (/** @type {string} */ name) => value(name) - (before.values.get(`xlora_${name}`) ?? 0);
    const seconds = (now.at - before.at) / 1000;
    const [hit, miss] = ["hit", "miss"].map((outcome) => `lookahead_drafts_total{outcome="${outcome}"}`);
    const recent = grown(hit) + grown(miss);
    const [hits, drafts] = recent ? [grown(hit), recent] : [value(hit), value(hit) + value(miss)];
    this.#set("running", String(value("requests_running")));
    this.#set("waiting", String(value("requests_waiting")));
    this.#set("rate", seconds ? (grown("generated_tokens_total") / seconds).toFixed(0) : "0");
    this.#set("hits", drafts ? `${Math.round((100 * hits) / drafts)} %` : "–");
  }

  /**
   * @param {string} name
   * @param {string} value
   */
  #set(name, value) {
    const cell = this.host.querySelector(`[data-live="${name}"]`);
    if (cell) cell.textContent = value;
  }
}

/**
 * @param {string} text  Prometheus' text format
 * @returns {Map<string, number>} samples by name and labels, as written
 */
function parse(text) {
  const lines = text.split("\n").filter((line) => line && !line.startsWith("#"));
  return new Map(
    lines.map((line) => [line.slice(0, line.lastIndexOf(" ")), Number(line.slice(line.lastIndexOf(" ") + 1))]),
  );
}
