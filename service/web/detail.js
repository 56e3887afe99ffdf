/** One token in detail: its experts' weights as bars, entropy, log-probability, alternatives. */

import { colourOf } from "./palette.js";

/** @typedef {import("./gate.js").Row} Row */

/**
 * Every token of a text takes the same height, so that what is below stays where it is under a moving pointer.
 * @param {HTMLElement} host
 * @param {Row} row
 * @param {{index: number, experts: string[], maxEntropy: number, scale: number}} context
 */
export function showDetail(host, row, { index, experts, maxEntropy, scale }) {
  const heading = document.createElement("h3");
  const code = document.createElement("code");
  code.textContent = JSON.stringify(row.token.text);
  heading.append(`Token ${index} `, code);
  const weights = row.weights.map((weight, expert) => ({
    name: experts[expert],
    value: weight.toFixed(3),
    share: Math.abs(weight) / scale,
    colour: colourOf(expert),
  }));
  host.replaceChildren(heading, bars("Weights of the experts", weights), facts(row, maxEntropy));
  const alternatives = row.token.top_logprobs ?? [];
  if (alternatives.length) {
    const title = document.createElement("h4");
    title.textContent = "Most likely tokens";
    const list = alternatives.map(({ text, logprob }) => ({
      name: JSON.stringify(text),
      value: percent(Math.exp(logprob)),
      share: Math.exp(logprob),
      colour: "",
    }));
    host.append(title, bars("Most likely tokens", list));
  }
  const hint = document.createElement("p");
  hint.className = "hint";
  hint.textContent = "Point at a token, or use the arrow keys. Click or Enter shows its sites.";
  host.append(hint);
}

/**
 * @param {Row} row
 * @param {number} maxEntropy  nats
 */
function facts({ token, entropy }, maxEntropy) {
  const list = document.createElement("dl");
  list.className = "facts";
  const add = (/** @type {string} */ name, /** @type {string} */ value) => {
    const [term, definition] = [document.createElement("dt"), document.createElement("dd")];
    [term.textContent, definition.textContent] = [name, value];
    list.append(term, definition);
  };
  add(
    "entropy",
    entropy === null ? "none: no expert acts" : `${entropy.toFixed(3)} nats (${percent(entropy / maxEntropy)})`,
  );
  if (token.logprob !== undefined) add("logprob", `${token.logprob.toFixed(3)} (${percent(Math.exp(token.logprob))})`);
  add("id", String(token.id));
  return list;
}

/**
 * @param {string} label
 * @param {{name: string, value: string, share: number, colour: string}[]} entries
 */
function bars(label, entries) {
  const list = document.createElement("ul");
  list.className = "bars";
  list.setAttribute("aria-label", label);
  for (const { name, value, share, colour } of entries) {
    const [item, title, track, fill, number] = ["li", "span", "span", "span", "span"].map((tag) =>
      document.createElement(tag),
    );
    [title.className, track.className, fill.className, number.className] = ["name", "track", "fill", "number"];
    [title.textContent, title.title, number.textContent] = [name, name, value];
    fill.style.width = `${Math.min(share, 1) * 100}%`;
    if (colour) fill.style.backgroundColor = colour;
    track.append(fill);
    item.append(title, track, number);
    list.append(item);
  }
  return list;
}

/** @param {number} share */
function percent(share) {
  return `${(share * 100).toFixed(share < 0.1 ? 1 : 0)} %`;
}
