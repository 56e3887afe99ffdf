/** What a result can be saved as: JSON, CSV, and a picture of its maps. */

import { drawMap, heightOf } from "./heatmap.js";
import { colourOf } from "./palette.js";

/**
 * @typedef {import("./gate.js").GatedText} GatedText
 * @typedef {import("./heatmap.js").MapData} MapData
 * @typedef {import("./heatmap.js").Inks} Inks
 */

const WIDEST_PICTURE = 16000; // pixels; browsers refuse larger canvases
const MARGIN = 16;

/**
 * @param {GatedText} text
 * @param {{request: object, answer: object}} about
 * @returns {Blob}
 */
export function asJson(text, about) {
  const { experts, sites, rows } = text;
  const size = experts.length;
  const full = rows.map(
    ({ full }) => full && sites.map((_, site) => [...full.subarray(site * size, (site + 1) * size)]),
  );
  const scalings = {
    experts,
    sites,
    mean: rows.map((row) => row.weights),
    entropy: rows.map((row) => row.entropy),
    ...(full.every(Boolean) ? { full } : {}),
  };
  const document = { ...about, tokens: rows.map((row) => row.token), scalings };
  return new Blob([JSON.stringify(document)], { type: "application/json" });
}

/**
 * One line per token.
 * @param {GatedText} text
 * @returns {Blob}
 */
export function asCsv({ experts, rows }) {
  const head = ["index", "id", "text", "leader", ...experts, "entropy_nats", "logprob"];
  const lines = rows.map(({ token, weights, entropy, lead }, index) => [
    index,
    token.id,
    token.text,
    lead < 0 ? "" : experts[lead],
    ...weights,
    entropy ?? "",
    token.logprob ?? "",
  ]);
  const quoted = [head, ...lines].map((line) => line.map((cell) => quote(String(cell))).join(","));
  return new Blob([`${quoted.join("\r\n")}\r\n`], { type: "text/csv" });
}

/** @param {string} cell */
function quote(cell) {
  return /[",\r\n]/.test(cell) ? `"${cell.replaceAll('"', '""')}"` : cell;
}

/**
 * The whole map, whatever part of it the page shows.
 * @param {MapData} data
 * @param {{title: string, inks: Inks, background: string}} look
 * @returns {Promise<Blob>}
 */
export async function asPng(data, { title, inks, background }) {
  const ratio = 2;
  const cell = Math.min(12, WIDEST_PICTURE / ratio / Math.max(data.columns, 1));
  const head = 48;
  const canvas = document.createElement("canvas");
  canvas.width = (Math.max(data.columns * cell, 480) + 2 * MARGIN) * ratio;
  canvas.height = (head + heightOf(data) + 2 * MARGIN) * ratio;
  const context = /** @type {CanvasRenderingContext2D} */ (canvas.getContext("2d"));
  context.scale(ratio, ratio);
  context.fillStyle = background;
  context.fillRect(0, 0, canvas.width, canvas.height);
  context.translate(MARGIN, MARGIN);
  context.fillStyle = inks.ink;
  context.font = "600 14px system-ui, sans-serif";
  context.fillText(title, 0, 12);
  drawLegend(context, data.experts, inks);
  context.translate(0, head);
  drawMap(context, data, { first: 0, last: data.columns, cell, inks });
  const blob = await new Promise((resolve) => canvas.toBlob(resolve, "image/png"));
  if (!blob) throw new Error("the browser could not make the picture");
  return blob;
}

/**
 * @param {CanvasRenderingContext2D} context
 * @param {string[]} experts
 * @param {Inks} inks
 */
function drawLegend(context, experts, inks) {
  context.font = "12px system-ui, sans-serif";
  let x = 0;
  experts.forEach((name, expert) => {
    context.fillStyle = colourOf(expert);
    context.fillRect(x, 22, 10, 10);
    context.fillStyle = inks.ink;
    context.fillText(name, x + 15, 31);
    x += context.measureText(name).width + 32;
  });
}

/**
 * @param {Blob} blob
 * @param {string} name
 */
export function save(blob, name) {
  const link = document.createElement("a");
  link.href = URL.createObjectURL(blob);
  link.download = name;
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 60_000); // the download has begun by then
}
