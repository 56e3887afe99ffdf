/** How a map is drawn on a canvas: cells in rows and columns, a curve above where there is one, an axis below. */

/**
 * @typedef {{colour: string, strength: number, cycle: number}} Cell  strength in 0..1; cycle: stripes that tell
 *   experts apart whose colours repeat
 * @typedef {{columns: number, names: string[], labels?: string[], cell: (column: number, row: number) => Cell|null,
 *            curve?: (column: number) => number|null, curveLabel?: string, tick: (column: number) => string|null,
 *            under?: (column: number) => string, boundary?: number, narrowest?: number}} MapData
 *   names: of the rows; labels: the same, short; curve is in 0..1, null leaves a gap; tick is the label under a column,
 *   `under` one above it that is written upwards; boundary: a column before which a line is drawn
 * @typedef {{ink: string, line: string}} Inks
 * @typedef {{first: number, last: number, cell: number, inks: Inks}} View  `last` is not drawn
 */

export const CURVE = 48;
export const GAP = 6;
const AXIS = 18;
const UPWARDS = 64; // the height of labels that are written upwards
const STRIPES = ["", "rgb(255 255 255 / .85)", "rgb(0 0 0 / .7)"];

/**
 * @param {MapData} data
 * @returns {number} in CSS pixels
 */
export function rowHeight({ names }) {
  if (names.length <= 10) return 20;
  return names.length <= 40 ? 13 : 6;
}

/** @param {MapData} data */
function top(data) {
  return data.curve ? CURVE + GAP : 0;
}

/**
 * @param {MapData} data
 * @returns {number} of all but the axis
 */
export function bodyOf(data) {
  return top(data) + data.names.length * rowHeight(data);
}

/**
 * @param {MapData} data
 * @returns {number} in CSS pixels
 */
export function heightOf(data) {
  return bodyOf(data) + (data.under ? UPWARDS : 0) + AXIS;
}

/**
 * @param {MapData} data
 * @param {number} y  in CSS pixels
 * @returns {number|null} the row that is there
 */
export function rowAt(data, y) {
  const row = Math.floor((y - top(data)) / rowHeight(data));
  return row >= 0 && row < data.names.length ? row : null;
}

/**
 * Draws some columns, the first at x = 0.
 * @param {CanvasRenderingContext2D} context
 * @param {MapData} data
 * @param {View} view
 */
export function drawMap(context, data, view) {
  drawCells(context, data, view);
  if (data.curve) drawCurve(context, data, view);
  drawBoundary(context, data, view);
  drawTicks(context, data, view);
}

/** @type {typeof drawMap} */
function drawCells(context, data, { first, last, cell, inks }) {
  const row = rowHeight(data);
  context.fillStyle = inks.line;
  for (let name = 0; name < data.names.length && row > 6; name += 1) {
    context.fillRect(0, top(data) + (name + 1) * row - 1, (last - first) * cell, 1);
  }
  const space = cell >= 6 ? 1 : 0;
  for (let column = first; column < last; column += 1) {
    for (let name = 0; name < data.names.length; name += 1) {
      const found = data.cell(column, name);
      if (!found || found.strength < 0.004) continue;
      const [x, y] = [(column - first) * cell, top(data) + name * row];
      context.globalAlpha = Math.min(found.strength, 1);
      context.fillStyle = found.colour;
      context.fillRect(x, y, cell - space, row - 1);
      if (!found.cycle) continue;
      context.fillStyle = STRIPES[found.cycle % STRIPES.length] || STRIPES[1];
      context.fillRect(x, y + Math.floor(row / 2) - 1, cell - space, 2);
    }
  }
  context.globalAlpha = 1;
}

/** @type {typeof drawMap} */
function drawCurve(context, data, { first, last, cell, inks }) {
  context.fillStyle = inks.line;
  context.fillRect(0, CURVE, (last - first) * cell, 1);
  context.strokeStyle = inks.ink;
  context.lineWidth = 1.5;
  context.lineJoin = "round";
  context.beginPath();
  let drawing = false;
  for (let column = Math.max(first - 1, 0); column < Math.min(last + 1, data.columns); column += 1) {
    const value = data.curve?.(column) ?? null;
    const [x, y] = [(column - first + 0.5) * cell, CURVE - (value ?? 0) * (CURVE - 3)];
    if (value !== null && drawing) context.lineTo(x, y);
    else if (value !== null) context.moveTo(x, y);
    drawing = value !== null;
  }
  context.stroke();
}

/** @type {typeof drawMap} */
function drawBoundary(context, data, { first, last, cell, inks }) {
  if (data.boundary === undefined || data.boundary < first || data.boundary > last) return;
  context.fillStyle = inks.ink;
  context.fillRect((data.boundary - first) * cell - 1.5, 0, 2, bodyOf(data) + 4);
}

/** @type {typeof drawMap} */
function drawTicks(context, data, { first, last, cell, inks }) {
  context.fillStyle = inks.ink;
  context.font = "11px system-ui, sans-serif";
  for (let column = first; column < last && data.under; column += 1) {
    context.save();
    context.translate((column - first + 0.5) * cell, bodyOf(data) + 5);
    context.rotate(-Math.PI / 2);
    context.textAlign = "right";
    context.textBaseline = "middle";
    context.fillText(data.under(column), 0, 0, UPWARDS - 8);
    context.restore();
  }
  context.textBaseline = "bottom";
  let free = -Infinity;
  for (let column = first; column < last; column += 1) {
    const [label, x] = [data.tick(column), (column - first) * cell];
    if (label === null || x < free) continue;
    context.fillText(label, x, heightOf(data) - 1);
    free = x + context.measureText(label).width + 10;
  }
}

/**
 * The theme's colours, as the style sheet gives them to an element.
 * @param {Element} element
 * @returns {Inks}
 */
export function inksOf(element) {
  const style = getComputedStyle(element);
  return { ink: style.color, line: style.outlineColor };
}
