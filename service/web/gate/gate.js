/**
 * One text with the gate's rows, growing while it streams. Knows numbers, not the page.
 *
 * Of a generated text and its prompt, a token's row is of the position that produced it, its predecessor: the prompt's
 * first token has none. Of a given text, a token's row is of its own position.
 */

import { decodeNpy } from "../server/npy.js";

/**
 * @typedef {{id: number, text: string, logprob?: number|null, top_logprobs?: {id: number, text: string, logprob: number}[]}} Token
 * @typedef {{experts?: string[], sites?: string[], start?: number, mean: number[][], entropy: (number|null)[], full?: string}} Scalings
 * @typedef {{token: Token, weights: number[], entropy: number|null, lead: number, full: Float32Array|null, known: boolean}} Row
 *   weights: [E], mean over the sites, as they weighted the experts; entropy: nats, null where no expert acts;
 *   lead: index of the leading expert, -1 where none acts; full: [S*E], or null when only the mean was asked for;
 *   known: whether there is a row of the gate at all
 */

export class GatedText {
  constructor() {
    /** @type {string[]} */
    this.experts = [];
    /** @type {string[]} */
    this.sites = [];
    /** @type {Row[]} the prompt's tokens first */
    this.rows = [];
    this.prompt = 0; // how many of the rows are the prompt's
    /** @type {number[]} tokens after the prompt that are led by each expert */
    this.led = [];
    /** @type {number[]} sum of each expert's share of the gate, over the same tokens */
    this.weight = [];
    this.entropies = 0; // sum over the same tokens
    this.acts = false; // whether any expert does, at any token
    this.maxWeight = 1; // the largest weight of any row, at least 1
  }

  /**
   * Puts the prompt before the text; its rows come with the first scalings.
   * @param {Token[]} tokens
   */
  setPrompt(tokens) {
    this.rows = tokens.map((token) => this.#row(token, undefined, 0, null));
    this.prompt = tokens.length;
  }

  /**
   * Adds tokens with their rows; rows before theirs belong to the prompt.
   * @param {Token[]} tokens
   * @param {Scalings|undefined} scalings
   * @returns {boolean} whether rows of the prompt came
   */
  add(tokens, scalings) {
    if (scalings?.experts && scalings.sites) this.#name(scalings.experts, scalings.sites);
    const count = scalings?.mean.length ?? 0;
    const full = scalings?.full ? decodeNpy(scalings.full).data : null;
    const before = Math.min(Math.max(count - tokens.length, 0), Math.max(this.prompt - 1 - (scalings?.start ?? 0), 0));
    for (let at = 0; at < before; at += 1) {
      const index = (scalings?.start ?? 0) + at + 1;
      this.rows[index] = this.#row(this.rows[index].token, scalings, at, full);
    }
    tokens.forEach((token, index) => {
      this.#count(this.#row(token, scalings, count - tokens.length + index, full));
    });
    return before > 0;
  }

  /** @returns {number} the largest entropy there can be, in nats */
  get maxEntropy() {
    return Math.log(Math.max(this.experts.length, 2));
  }

  /** @returns {Row[]} those after the prompt */
  get answer() {
    return this.rows.slice(this.prompt);
  }

  /** @returns {number} tokens after the prompt at which no expert acts */
  get unled() {
    return this.rows.length - this.prompt - this.led.reduce((sum, count) => sum + count, 0);
  }

  /**
   * @param {string[]} experts
   * @param {string[]} sites
   */
  #name(experts, sites) {
    [this.experts, this.sites] = [experts, sites];
    this.led = experts.map(() => 0);
    this.weight = experts.map(() => 0);
    for (const row of this.rows) row.weights = experts.map(() => 0);
  }

  /**
   * @param {Token} token
   * @param {Scalings|undefined} scalings
   * @param {number} at  row of the scalings
   * @param {Float32Array|null} full  of all their rows
   * @returns {Row}
   */
  #row(token, scalings, at, full) {
    const size = this.sites.length * this.experts.length;
    const given = scalings?.mean[at];
    const weights = given ?? this.experts.map(() => 0);
    this.maxWeight = Math.max(this.maxWeight, ...weights.map(Math.abs));
    const part = full && at >= 0 ? full.subarray(at * size, (at + 1) * size) : null;
    const [entropy, lead] = [scalings?.entropy[at] ?? null, leaderOf(weights)];
    this.acts ||= lead >= 0;
    return { token, weights, entropy, lead, full: part, known: given !== undefined };
  }

  /** @param {Row} row  after the prompt */
  #count(row) {
    this.rows.push(row);
    this.entropies += row.entropy ?? 0;
    if (row.lead < 0) return;
    this.led[row.lead] += 1;
    sharesOf(row.weights).forEach((share, expert) => (this.weight[expert] += share));
  }
}

/**
 * @param {ArrayLike<number>} weights  [E]; without a softmax some may be negative
 * @returns {number[]} [E], shares of the whole, 0 where no expert acts
 */
export function sharesOf(weights) {
  const sizes = Array.from(weights, Math.abs);
  const total = sizes.reduce((sum, size) => sum + size, 0);
  return sizes.map((size) => (total ? size / total : 0));
}

/**
 * @param {ArrayLike<number>} weights
 * @returns {number} index of the largest share, -1 when all are 0
 */
export function leaderOf(weights) {
  const shares = sharesOf(weights);
  const largest = Math.max(...shares);
  return largest > 0 ? shares.indexOf(largest) : -1;
}
