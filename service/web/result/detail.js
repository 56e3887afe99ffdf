/** One token in detail: its experts' weights as bars, entropy, log-probability, alternatives. */

import { shortNames } from "../gate/labels.js";
import { colourOf } from "../gate/palette.js";

/** @typedef {import("../gate/gate.js").Row} Row */

/**
 * Every token of a text takes the same height, so that what is below stays where it is under a moving pointer.
 * @param {HTMLElement} host
 * @param {Row} row
 * @param {{place: string, isPrompt: boolean, experts: string[], maxEntropy: number, scale: number}} context
 */
export function showDetail(host, row, { place, isPrompt, experts, maxEntropy, scale }) {
  const heading = document.createElement("h3");
  const code = document.createElement("code");
  code.textContent = JSON.stringify(row.token.text);
  heading.append(`${isPrompt ? "Prompt token" : "Token"} ${place} `, code);
  const labels = shortNames(experts);
  const weights = row.weights.map((weight, expert) => ({
    name: labels[expert],
    tip: experts[expert],
    value: weight.toFixed(3),
    share: Math.abs(weight) / scale,
    colour: colourOf(expert),
  }));
  host.replaceChildren(heading, bars("Weights of the experts", weights), facts(row, maxEntropy, experts.length));
  const alternatives = row.token.top_logprobs ?? [];
  if (alternatives.length) {
    const title = document.createElement("h4");
    title.textContent = "Most likely tokens";
    const list = alternatives.map(({ text, logprob }) => ({
      name: JSON.stringify(text),
      tip: JSON.stringify(text),
      value: percent(Math.exp(logprob)),
      share: Math.exp(logprob),
      colour: "",
    }));
    host.append(title, bars("Most likely tokens", list));
  }
  const hint = document.createElement("p");
  hint.className = "hint";
  hint.textContent = "Point at a token, or use the arrow keys. Click or Enter keeps it, and shows its sites below.";
  host.append(hint);
}

/**
 * @param {Row} row
 * @param {number} maxEntropy  nats
 * @param {number} experts  how many there are
 */
function facts({ token, entropy, known }, maxEntropy, experts) {
  const list = document.createElement("dl");
  list.className = "facts";
  const add = (/** @type {string} */ name, /** @type {string} */ value, /** @type {string} */ tip) => {
    const [term, definition] = [document.createElement("dt"), document.createElement("dd")];
    [term.textContent, definition.textContent] = [name, value];
    term.dataset.tip = definition.dataset.tip = tip;
    list.append(term, definition);
  };
  add(
    "entropy",
    entropy === null ? withoutEntropy(known) : `${entropy.toFixed(3)} nats (${percent(entropy / maxEntropy)} of ln ${experts})`,
    "The mean of the entropies of its sites' gates. ln E nats is the most that E experts can have: all share equally.",
  );
  const logprob = token.logprob == null ? "not computed" : `${token.logprob.toFixed(3).replace(/^-(?=0\.0+$)/, "")} (${percent(Math.exp(token.logprob))})`;
  add("logprob", logprob, "How likely the model found this token, in nats: 0 is certain. Its negative is the surprisal.");
  add("id", String(token.id), "The token's number in the vocabulary.");
  return list;
}

/**
 * @param {string} label
 * @param {{name: string, tip: string, value: string, share: number, colour: string}[]} entries
 */
function bars(label, entries) {
  const list = document.createElement("ul");
  list.className = "bars";
  list.setAttribute("aria-label", label);
  for (const { name, tip, value, share, colour } of entries) {
    const [item, title, track, fill, number] = ["li", "span", "span", "span", "span"].map((tag) =>
      document.createElement(tag),
    );
    [title.className, track.className, fill.className, number.className] = ["name", "track", "fill", "number"];
    [title.textContent, title.dataset.tip, number.textContent] = [name, tip, value];
    fill.style.width = `${Math.min(share, 1) * 100}%`;
    if (colour) fill.style.backgroundColor = colour;
    track.append(fill);
    item.append(title, track, number);
    list.append(item);
  }
  return list;
}

/** @param {boolean} known  whether there is a row of the gate */
function withoutEntropy(known) {
  return known ? "none: no expert acts" : "unknown: nothing came before";
}

/** @param {number} share */
function percent(share) {
  return `${(share * 100).toFixed(share < 0.1 ? 1 : 0)} %`;
}
