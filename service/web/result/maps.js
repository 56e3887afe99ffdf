/** What the maps show: experts along the text, layers along the text, sites of one token. Knows numbers and colours. */

import { expertOf } from "../gate/colouring.js";
import { leaderOf, sharesOf } from "../gate/gate.js";
import { groupSites, layerOf, moduleOf, read } from "../gate/groups.js";
import { shortNames } from "../gate/labels.js";
import { colourOf, cycleOf, ENTROPY } from "../gate/palette.js";

/**
 * @typedef {import("../gate/gate.js").GatedText} GatedText
 * @typedef {import("./drawing.js").MapData} MapData
 */

const TICK_TOKENS = 10;
const LEAST_SITE = 13; // pixels: names are written upwards under each

/**
 * The part that all maps along the text share.
 * @param {GatedText} text
 * @param {number} first  index of the token in the first column
 */
function along(text, first) {
  return {
    columns: text.rows.length - first,
    boundary: first < text.prompt ? text.prompt - first : undefined,
    tick: (/** @type {number} */ column) => {
      const place = column + first - text.prompt;
      return place % TICK_TOKENS ? null : String(place).replace("-", "−");
    },
  };
}

/**
 * @param {GatedText} text
 * @param {number} first
 * @returns {MapData}
 */
export function tokenMap(text, first) {
  const { rows, experts, maxEntropy, maxWeight } = text;
  return {
    ...along(text, first),
    names: experts,
    labels: shortNames(experts),
    cell: (column, expert) => ({
      colour: colourOf(expert),
      strength: Math.abs(rows[column + first].weights[expert]) / maxWeight,
      cycle: cycleOf(expert),
    }),
    curve: (column) => {
      const { entropy } = rows[column + first];
      return entropy === null ? null : entropy / maxEntropy;
    },
    curveLabel: "entropy",
  };
}

/**
 * @param {GatedText} text
 * @param {number} first
 * @param {{colour: string, group: string}} look
 * @returns {MapData}
 */
export function layerMap(text, first, { colour, group }) {
  const { rows, experts, sites, maxEntropy, maxWeight } = text;
  const grouping = groupSites(sites, group);
  const chosen = expertOf(colour);
  return {
    ...along(text, first),
    names: grouping.names,
    cell: (column, at) => {
      const { full } = rows[column + first];
      if (!full) return null;
      const { weights, entropy } = read(full, experts.length, grouping);
      if (colour === "entropy") return { colour: ENTROPY, strength: entropy[at] / maxEntropy, cycle: 0 };
      const own = weights.subarray(at * experts.length, (at + 1) * experts.length);
      if (chosen !== null) {
        return { colour: colourOf(chosen), strength: Math.abs(own[chosen]) / maxWeight, cycle: 0 };
      }
      const lead = leaderOf(own);
      return lead < 0 ? null : { colour: colourOf(lead), strength: sharesOf(own)[lead], cycle: cycleOf(lead) };
    },
  };
}

/**
 * @param {GatedText} text
 * @param {number} token
 * @param {number} at  group
 * @param {string} group
 * @returns {string} the weights of a cell of the layer map, in words
 */
export function readLayer(text, token, at, group) {
  const { full } = text.rows[token];
  if (!full) return "";
  const grouping = groupSites(text.sites, group);
  const { weights } = read(full, text.experts.length, grouping);
  const own = weights.subarray(at * text.experts.length, (at + 1) * text.experts.length);
  return `token ${placeOf(text, token)}, ${grouping.names[at]}: ${written(text.experts, own)}`;
}

/**
 * @param {GatedText} text
 * @param {Float32Array} full  [S*E]
 * @returns {MapData}
 */
export function siteMap({ experts, sites }, full) {
  const scale = full.reduce((largest, weight) => Math.max(largest, Math.abs(weight)), 1);
  const layers = sites.map(layerOf);
  const begins = (/** @type {number} */ site) => site === 0 || layers[site] !== layers[site - 1];
  return {
    columns: sites.length,
    names: experts,
    labels: shortNames(experts),
    cell: (site, expert) => ({
      colour: colourOf(expert),
      strength: Math.abs(full[site * experts.length + expert]) / scale,
      cycle: cycleOf(expert),
    }),
    tick: (site) => (begins(site) && layers[site] !== null ? `layer ${layers[site]}` : null),
    under: (site) => moduleOf(sites[site]),
    narrowest: LEAST_SITE,
  };
}

/**
 * @param {GatedText} text
 * @param {Float32Array} full
 * @param {number} site
 * @returns {string} the weights of a site, in words
 */
export function readSite({ experts, sites }, full, site) {
  return `${sites[site]}: ${written(experts, full.subarray(site * experts.length, (site + 1) * experts.length))}`;
}

/**
 * @param {string[]} experts
 * @param {Float32Array} weights
 */
function written(experts, weights) {
  return experts.map((name, expert) => `${name} ${weights[expert].toFixed(3)}`).join(", ");
}

/**
 * @param {GatedText} text
 * @param {number} token  index
 * @returns {string} its place in the text; the prompt's are negative
 */
export function placeOf(text, token) {
  return String(token - text.prompt).replace("-", "−");
}
