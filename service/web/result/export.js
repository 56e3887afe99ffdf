/** What a result can be saved as: JSON, CSV, and a picture of its maps. */

import { colourOf } from "../gate/palette.js";
import { drawMap, heightOf } from "./drawing.js";

/**
 * @typedef {import("../gate/gate.js").GatedText} GatedText
 * @typedef {import("./drawing.js").MapData} MapData
 * @typedef {import("./drawing.js").Inks} Inks
 */

// Of the picture, in CSS pixels; RATIO real ones each. Browsers refuse canvases with sides over LARGEST real pixels.
const [RATIO, LARGEST] = [2, 16000];
const [CELL, COLUMNS, MARGIN, HEAD, LINE_GAP, LEAST_WIDTH] = [12, 100, 16, 48, 14, 480];

/**
 * @param {GatedText} text
 * @param {{request: object, answer: object}} about
 * @returns {Blob}
 */
export function asJson(text, about) {
  const { experts, sites, rows, prompt } = text;
  const own = { experts, sites, ...rowsOf(text, rows.slice(prompt)) };
  const tokens = rows.map((row) => row.token);
  const document = { ...about, tokens: tokens.slice(prompt), scalings: own };
  const before = { tokens: tokens.slice(0, prompt), scalings: rowsOf(text, rows.slice(0, prompt)) };
  return new Blob([JSON.stringify(prompt ? { ...document, prompt: before } : document)], { type: "application/json" });
}

/**
 * @param {GatedText} text
 * @param {GatedText["rows"]} rows
 * @returns {object} their part of the scalings; null for a token without a row
 */
function rowsOf({ experts, sites }, rows) {
  const size = experts.length;
  const full = rows.map(
    ({ full }) => full && sites.map((_, site) => [...full.subarray(site * size, (site + 1) * size)]),
  );
  return {
    mean: rows.map((row) => (row.known ? row.weights : null)),
    entropy: rows.map((row) => row.entropy),
    ...(full.some(Boolean) ? { full } : {}),
  };
}

/**
 * One line per token; the prompt's have negative indices.
 * @param {GatedText} text
 * @returns {Blob}
 */
export function asCsv({ experts, rows, prompt }) {
  const head = ["index", "id", "text", "leader", ...experts, "entropy_nats", "logprob"];
  const lines = rows.map(({ token, weights, entropy, lead, known }, index) => [
    index - prompt,
    token.id,
    token.text,
    lead < 0 ? "" : experts[lead],
    ...weights.map((weight) => (known ? weight : "")),
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
 * The whole map, whatever part of it the page shows, in lines like a text.
 * @param {MapData} data
 * @param {{title: string, inks: Inks, background: string}} look
 * @returns {Promise<Blob>}
 */
export async function asPng(data, { title, inks, background }) {
  const line = heightOf(data) + LINE_GAP;
  const mostLines = Math.floor((LARGEST / RATIO - HEAD - 2 * MARGIN) / line);
  const perLine = Math.max(COLUMNS, Math.ceil(data.columns / mostLines));
  const lines = Math.ceil(data.columns / perLine);
  const width = Math.max(Math.min(perLine, data.columns) * CELL, LEAST_WIDTH);
  const canvas = document.createElement("canvas");
  canvas.width = (width + 2 * MARGIN) * RATIO;
  canvas.height = (HEAD + lines * line + 2 * MARGIN) * RATIO;
  const context = /** @type {CanvasRenderingContext2D} */ (canvas.getContext("2d"));
  context.fillStyle = background;
  context.fillRect(0, 0, canvas.width, canvas.height);
  context.scale(RATIO, RATIO);
  context.translate(MARGIN, MARGIN);
  context.fillStyle = inks.ink;
  context.font = "600 14px system-ui, sans-serif";
  context.fillText(title, 0, 12);
  drawLegend(context, data.names, inks);
  context.translate(0, HEAD);
  for (let first = 0; first < data.columns; first += perLine) {
    drawMap(context, data, { first, last: Math.min(first + perLine, data.columns), cell: CELL, inks });
    context.translate(0, line);
  }
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
