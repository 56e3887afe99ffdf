/** Colours of the experts: Okabe and Ito's, which stay apart for every kind of colour blindness. Knows no page. */

const COLOURS = ["#0072b2", "#e69f00", "#009e73", "#cc79a7", "#56b4e9", "#d55e00", "#b8a800", "#888888"];
const LINES = ["solid", "dashed", "dotted", "double"];

/** The colour of no expert. */
export const NEUTRAL = "#8a8f98";

/**
 * @param {number} expert  index; -1 is no expert
 * @returns {string} "#rrggbb"
 */
export function colourOf(expert) {
  return expert < 0 ? NEUTRAL : COLOURS[expert % COLOURS.length];
}

/**
 * A second mark beside the colour: the line under a token tells experts apart whose colours repeat.
 * @param {number} expert
 * @returns {string} a CSS border style
 */
export function lineOf(expert) {
  return expert < 0 ? "none" : LINES[Math.floor(expert / COLOURS.length) % LINES.length];
}
