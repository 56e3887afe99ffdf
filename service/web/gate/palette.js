/** Colours of the experts: Okabe and Ito's, which stay apart for every kind of colour blindness. Knows no page. */

const COLOURS = ["#0072b2", "#e69f00", "#009e73", "#cc79a7", "#56b4e9", "#d55e00", "#b8a800", "#888888"];
const LINES = ["solid", "dashed", "dotted", "double"];

/** The colour of no expert. */
export const NEUTRAL = "#8a8f98";
/** What is no expert's: how undecided the gate is, and how unexpected a token. */
export const ENTROPY = "#7b5cc9";
export const SURPRISAL = "#c4452f";

/**
 * @param {number} expert  index; -1 is no expert
 * @returns {string} "#rrggbb"
 */
export function colourOf(expert) {
  return expert < 0 ? NEUTRAL : COLOURS[expert % COLOURS.length];
}

/**
 * @param {number} expert
 * @returns {number} how often the colours have been used up before it: 0 for the first eight
 */
export function cycleOf(expert) {
  return expert < 0 ? 0 : Math.floor(expert / COLOURS.length);
}

/**
 * A second mark beside the colour: the line under a token tells experts apart whose colours repeat. In maps it is stripes.
 * @param {number} expert
 * @returns {string} a CSS border style
 */
export function lineOf(expert) {
  return expert < 0 ? "none" : LINES[cycleOf(expert) % LINES.length];
}
