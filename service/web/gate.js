/**
 * One text with the gate's rows, growing while it streams. Knows numbers, not the page.
 *
 * For a generated text, row i is of the position that produced token i; for a given text, of token i itself.
 */

import { decodeNpy } from "./npy.js";

/**
 * @typedef {{id: number, text: string, logprob?: number, top_logprobs?: {id: number, text: string, logprob: number}[]}} Token
 * @typedef {{experts?: string[], sites?: string[], mean: number[][], entropy: (number|null)[], full?: string}} Scalings
 * @typedef {{token: Token, weights: number[], entropy: number|null, lead: number, full: Float32Array|null}} Row
 *   weights: [E], mean over the sites, as they weighted the experts; entropy: nats, null where no expert acts;
 *   lead: index of the leading expert, -1 where none acts; full: [S*E], or null when only the mean was asked for
 */

export class GatedText {
  constructor() {
    /** @type {string[]} */
    this.experts = [];
    /** @type {string[]} */
    this.sites = [];
    /** @type {Row[]} */
    this.rows = [];
    /** @type {number[]} tokens led by each expert */
    this.led = [];
    /** @type {number[]} sum of each expert's share of the gate */
    this.weight = [];
    this.maxWeight = 1; // the largest weight of any row, at least 1
  }

  /**
   * Adds tokens with their rows; where there are more rows than tokens, the last ones belong to them.
   * @param {Token[]} tokens
   * @param {Scalings|undefined} scalings
   */
  add(tokens, scalings) {
    if (scalings?.experts && scalings.sites) {
      [this.experts, this.sites] = [scalings.experts, scalings.sites];
      this.led = this.experts.map(() => 0);
      this.weight = this.experts.map(() => 0);
    }
    const skipped = (scalings?.mean.length ?? 0) - tokens.length;
    const full = scalings?.full ? decodeNpy(scalings.full).data : null;
    const size = this.sites.length * this.experts.length;
    tokens.forEach((token, index) => {
      const at = skipped + index;
      const weights = scalings?.mean[at] ?? this.experts.map(() => 0);
      const part = full && at >= 0 ? full.subarray(at * size, (at + 1) * size) : null;
      this.#push({ token, weights, entropy: scalings?.entropy[at] ?? null, lead: leaderOf(weights), full: part });
    });
  }

  /** @returns {number} the largest entropy there can be, in nats */
  get maxEntropy() {
    return Math.log(Math.max(this.experts.length, 2));
  }

  /** @returns {number} tokens at which no expert acts */
  get unled() {
    return this.rows.length - this.led.reduce((sum, count) => sum + count, 0);
  }

  /** @param {Row} row */
  #push(row) {
    this.rows.push(row);
    this.maxWeight = Math.max(this.maxWeight, ...row.weights.map(Math.abs));
    if (row.lead < 0) return;
    this.led[row.lead] += 1;
    sharesOf(row.weights).forEach((share, expert) => (this.weight[expert] += share));
  }
}

/**
 * @param {number[]} weights  [E]; without a softmax some may be negative
 * @returns {number[]} [E], shares of the whole, 0 where no expert acts
 */
export function sharesOf(weights) {
  const total = weights.reduce((sum, weight) => sum + Math.abs(weight), 0);
  return weights.map((weight) => (total ? Math.abs(weight) / total : 0));
}

/**
 * @param {number[]} weights
 * @returns {number} index of the largest share, -1 when all are 0
 */
function leaderOf(weights) {
  const shares = sharesOf(weights);
  const largest = Math.max(...shares);
  return largest > 0 ? shares.indexOf(largest) : -1;
}
