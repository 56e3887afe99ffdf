/** The experts with their shares, each a button that colours the text by its weight; and the scale of such colours. */

import { expertOf, scaleOf } from "../gate/colouring.js";
import { shortNames } from "../gate/labels.js";
import { colourOf, lineOf, NEUTRAL } from "../gate/palette.js";

/** @typedef {import("../gate/gate.js").GatedText} GatedText */

/**
 * @param {HTMLElement} host  a list
 * @param {GatedText} text
 * @param {string} by  what the colours stand for
 * @param {(by: string) => void} choose
 */
export function showLegend(host, text, by, choose) {
  const { experts, led, weight, rows, prompt, unled } = text;
  const tokens = Math.max(rows.length - prompt, 1);
  const share = (/** @type {number} */ count) => `${Math.round((100 * count) / tokens)} %`;
  const labels = shortNames(experts);
  const entries = experts.map((name, expert) =>
    entry({
      name: labels[expert],
      led: share(led[expert]),
      mean: (weight[expert] / tokens).toFixed(2),
      colour: colourOf(expert),
      line: lineOf(expert),
      tip: `${name} leads ${share(led[expert])} of the tokens; its mean share of the gate is ${(weight[expert] / tokens).toFixed(2)}. Press to colour by its weight.`,
      chosen: expertOf(by) === expert,
      choose: () => choose(expertOf(by) === expert ? "lead" : `expert:${expert}`),
    }),
  );
  if (unled) {
    const tip = `no expert acts at ${share(unled)} of the tokens`;
    entries.push(entry({ name: "no expert", led: share(unled), mean: "", colour: NEUTRAL, line: "none", tip }));
  }
  update(host, entries);
}

/**
 * Replaces the entries, and keeps the focus where it was.
 * @param {HTMLElement} host
 * @param {HTMLElement[]} entries
 */
function update(host, entries) {
  const focused = [...host.children].findIndex((item) => item.contains(document.activeElement));
  host.replaceChildren(...entries);
  if (focused >= 0) host.children[focused]?.querySelector("button")?.focus({ preventScroll: true });
}

/**
 * @param {{name: string, led: string, mean: string, colour: string, line: string, tip: string, chosen?: boolean,
 *          choose?: () => void}} about
 */
function entry({ name, led, mean, colour, line, tip, chosen, choose }) {
  const item = document.createElement("li");
  const [swatch, title, strong, small] = ["span", "span", "strong", "small"].map((tag) => document.createElement(tag));
  swatch.className = "swatch";
  swatch.style.setProperty("--colour", colour);
  swatch.style.borderBottomStyle = line;
  [title.className, title.textContent] = ["expert", name];
  strong.textContent = led;
  small.textContent = mean && `mean ${mean}`;
  const box = document.createElement(choose ? "button" : "span");
  if (box instanceof HTMLButtonElement && choose) {
    box.type = "button";
    box.setAttribute("aria-pressed", String(Boolean(chosen)));
    box.addEventListener("click", choose);
  }
  box.classList.add("entry");
  box.dataset.tip = tip;
  box.append(swatch, title, " ", strong, " ", small);
  item.append(box);
  return item;
}

/**
 * @param {HTMLElement} host
 * @param {GatedText} text
 * @param {string} by
 */
export function showScale(host, text, by) {
  const scale = scaleOf(by, text);
  host.hidden = scale === null;
  if (!scale) return;
  const [label, low, ramp, high] = ["span", "span", "span", "span"].map((tag) => document.createElement(tag));
  [label.textContent, low.textContent, high.textContent] = [`${scale.label}: `, scale.low, scale.high];
  ramp.className = "ramp";
  ramp.style.setProperty("--colour", scale.colour);
  host.replaceChildren(label, low, ramp, high);
}
