/** Sites by decoder layer or by module name, and a row of the gate read by such groups. Knows names and numbers. */

import { sharesOf } from "./gate.js";

/** @typedef {{by: string, names: string[], sites: number[][]}} Grouping  the sites of each group, by index */

/**
 * @param {string} site
 * @returns {string|null} its decoder layer: the first number in its name
 */
export function layerOf(site) {
  return /(?:^|\.)(\d+)\./.exec(site)?.[1] ?? null;
}

/**
 * @param {string} site
 * @returns {string} as q_proj
 */
export function moduleOf(site) {
  return site.slice(site.lastIndexOf(".") + 1);
}

/**
 * @param {string[]} sites
 * @param {string} by  "layer", "module" or "site"
 * @returns {Grouping}
 */
export function groupSites(sites, by) {
  const name = { layer: layerName, module: moduleOf, site: siteName }[by] ?? siteName;
  /** @type {Map<string, number[]>} */
  const groups = new Map();
  sites.forEach((site, index) => groups.set(name(site), [...(groups.get(name(site)) ?? []), index]));
  return { by, names: [...groups.keys()], sites: [...groups.values()] };
}

/** @param {string} site */
function layerName(site) {
  const layer = layerOf(site);
  return layer === null ? moduleOf(site) : `layer ${layer}`;
}

/** @param {string} site */
function siteName(site) {
  const layer = layerOf(site);
  return layer === null ? site : `${layer} ${moduleOf(site)}`;
}

/**
 * @typedef {{weights: Float32Array, entropy: Float32Array}} Grouped  [G*E] means over the sites, [G] in nats
 * @type {WeakMap<Float32Array, Map<string, Grouped>>}
 */
const seen = new WeakMap();

/**
 * @param {Float32Array} full  [S*E]
 * @param {number} experts
 * @param {Grouping} grouping
 * @returns {Grouped}
 */
export function read(full, experts, grouping) {
  const found = seen.get(full) ?? new Map();
  seen.set(full, found);
  let grouped = found.get(grouping.by);
  if (!grouped) found.set(grouping.by, (grouped = compute(full, experts, grouping)));
  return grouped;
}

/** @type {typeof read} */
function compute(full, experts, { sites }) {
  const weights = new Float32Array(sites.length * experts);
  const entropy = new Float32Array(sites.length);
  sites.forEach((group, at) => {
    for (const site of group) {
      const row = full.subarray(site * experts, (site + 1) * experts);
      row.forEach((weight, expert) => (weights[at * experts + expert] += weight / group.length));
      entropy[at] += entropyOf(row) / group.length;
    }
  });
  return { weights, entropy };
}

/**
 * @param {ArrayLike<number>} weights
 * @returns {number} nats; 0 where no expert acts
 */
function entropyOf(weights) {
  return sharesOf(weights).reduce((sum, share) => sum - (share > 0 ? share * Math.log(share) : 0), 0);
}
