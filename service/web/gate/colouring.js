/** What a token's colour can stand for: the leading expert, one expert's weight, the gate's entropy, the surprisal. */

import { sharesOf } from "./gate.js";
import { colourOf, ENTROPY, lineOf, NEUTRAL, SURPRISAL } from "./palette.js";

/**
 * @typedef {import("./gate.js").GatedText} GatedText
 * @typedef {import("./gate.js").Row} Row
 * @typedef {{colour: string, strength: number, line: string}} Paint  strength in 0..1
 * @typedef {{label: string, low: string, high: string, colour: string}} Scale  of a colour that stands for a number
 */

export const MAX_NATS = 6; // of surprisal: what is drawn as strong as it gets

/**
 * @param {string} by  "lead", "expert:2", "entropy" or "surprisal"
 * @returns {number|null} the expert whose weight it is
 */
export function expertOf(by) {
  return by.startsWith("expert:") ? Number(by.slice("expert:".length)) : null;
}

/**
 * @param {string} by
 * @param {GatedText} text
 * @param {Row} row
 * @returns {Paint}
 */
export function paint(by, text, row) {
  const expert = expertOf(by);
  if (by === "surprisal") return shade(SURPRISAL, row.token.logprob == null ? 0 : -row.token.logprob / MAX_NATS);
  if (!row.known) return { colour: NEUTRAL, strength: 0, line: "none" };
  if (by === "entropy") return shade(ENTROPY, (row.entropy ?? 0) / text.maxEntropy);
  if (expert !== null) return shade(colourOf(expert), Math.abs(row.weights[expert] ?? 0) / text.maxWeight);
  const least = 1 / Math.max(text.experts.length, 2);
  const share = row.lead < 0 ? 0 : sharesOf(row.weights)[row.lead];
  const strength = row.lead < 0 ? 0 : 0.25 + (0.75 * Math.max(share - least, 0)) / (1 - least);
  return { colour: colourOf(row.lead), strength, line: lineOf(row.lead) };
}

/**
 * @param {string} colour
 * @param {number} strength
 * @returns {Paint}
 */
function shade(colour, strength) {
  return { colour, strength: Math.min(Math.max(strength, 0), 1), line: "none" };
}

/**
 * @param {string} by
 * @param {GatedText} text
 * @returns {Scale|null} null where colours are names, as the legend has them
 */
export function scaleOf(by, text) {
  const expert = expertOf(by);
  if (by === "entropy") {
    const high = `${text.maxEntropy.toFixed(2)} nats, ln ${Math.max(text.experts.length, 2)}`;
    return { label: "gate entropy", low: "0", high, colour: ENTROPY };
  }
  if (by === "surprisal") return { label: "surprisal", low: "0: certain", high: `${MAX_NATS} nats or more`, colour: SURPRISAL };
  if (expert === null) return null;
  return { label: `weight of ${text.experts[expert]}`, low: "0", high: text.maxWeight.toFixed(2), colour: colourOf(expert) };
}
