/**
 * A heat map on a canvas: one row per expert, one column per token or site, and a curve above where there is one.
 *
 * Only the columns in view are drawn, so its cost does not grow with the text.
 */

import { colourOf } from "./palette.js";

/**
 * @typedef {{columns: number, experts: string[], weight: (column: number, expert: number) => number, scale: number,
 *            curve?: (column: number) => number|null, curveLabel?: string, tick: (column: number) => string|null}} MapData
 *   weight is drawn as opaque at `scale`; curve is in 0..1, null leaves a gap; tick is the label under a column
 * @typedef {{ink: string, line: string}} Inks
 */

const CURVE = 48;
const GAP = 6;
const AXIS = 18;
const [NARROWEST, WIDEST] = [4, 18];

/** @param {number} experts */
function rowHeight(experts) {
  return experts > 10 ? 13 : 20;
}

/** @param {MapData} data */
function top(data) {
  return data.curve ? CURVE + GAP : 0;
}

/**
 * @param {MapData} data
 * @returns {number} in CSS pixels
 */
export function heightOf(data) {
  return top(data) + data.experts.length * rowHeight(data.experts.length) + AXIS;
}

/**
 * Draws some columns, the first at x = 0.
 * @param {CanvasRenderingContext2D} context
 * @param {MapData} data
 * @param {{first: number, last: number, cell: number, inks: Inks}} view  `last` is not drawn
 */
export function drawMap(context, data, { first, last, cell, inks }) {
  const row = rowHeight(data.experts.length);
  const width = (last - first) * cell;
  context.fillStyle = inks.line;
  for (let expert = 0; expert < data.experts.length; expert += 1) {
    context.fillRect(0, top(data) + (expert + 1) * row - 1, width, 1);
  }
  const space = cell >= 6 ? 1 : 0;
  for (let column = first; column < last; column += 1) {
    for (let expert = 0; expert < data.experts.length; expert += 1) {
      const strength = Math.min(Math.abs(data.weight(column, expert)) / data.scale, 1);
      if (strength < 0.004) continue;
      context.globalAlpha = strength;
      context.fillStyle = colourOf(expert);
      context.fillRect((column - first) * cell, top(data) + expert * row, cell - space, row - 1);
    }
  }
  context.globalAlpha = 1;
  if (data.curve) drawCurve(context, data, { first, last, cell, inks });
  drawTicks(context, data, { first, last, cell, inks });
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
function drawTicks(context, data, { first, last, cell, inks }) {
  context.fillStyle = inks.ink;
  context.font = "11px system-ui, sans-serif";
  context.textBaseline = "bottom";
  let free = -Infinity;
  for (let column = first; column < last; column += 1) {
    const [label, x] = [data.tick(column), (column - first) * cell];
    if (label === null || x < free) continue;
    context.fillText(label, x, heightOf(data) - 1);
    free = x + context.measureText(label).width + 10;
  }
}

/** The map in the page: scrolls, follows the end of a growing text, tells which column is under the pointer. */
export class HeatMap {
  /**
   * @param {HTMLElement} host
   * @param {string} label  for screen readers
   * @param {{onHover: (column: number|null) => void, onPick: (column: number) => void, onMove: (by: number) => void}} handlers
   */
  constructor(host, label, handlers) {
    this.names = document.createElement("ul");
    this.names.className = "names";
    this.names.setAttribute("aria-hidden", "true"); // the legend and the scroller's label say it
    this.scroller = document.createElement("div");
    this.scroller.className = "scroller";
    this.scroller.tabIndex = 0;
    this.scroller.setAttribute("role", "group");
    this.label = label;
    this.canvas = document.createElement("canvas");
    this.spacer = document.createElement("div");
    this.scroller.append(this.canvas, this.spacer);
    host.replaceChildren(this.names, this.scroller);
    this.handlers = handlers;
    /** @type {MapData|null} */
    this.data = null;
    /** @type {[number|null, number|null]} the column under the pointer or focus, and the one picked */
    this.marked = [null, null];
    this.frame = 0;
    this.#listen();
  }

  /** @param {MapData} data */
  show(data) {
    const following = this.scroller.scrollLeft + this.scroller.clientWidth >= this.scroller.scrollWidth - 2;
    this.data = data;
    this.#nameRows(data);
    this.scroller.setAttribute("aria-label", `${this.label}: ${data.columns} columns, ${data.experts.length} experts`);
    this.spacer.style.width = `${data.columns * this.cell}px`;
    if (following) this.scroller.scrollLeft = this.scroller.scrollWidth;
    this.redraw();
  }

  /**
   * @param {number|null} active
   * @param {number|null} picked
   */
  mark(active, picked) {
    this.marked = [active, picked];
    this.redraw();
  }

  /** @param {number} column  scrolls there when it is out of view */
  reveal(column) {
    const [left, right] = [this.scroller.scrollLeft, this.scroller.scrollLeft + this.scroller.clientWidth];
    const x = column * this.cell;
    if (x < left || x + this.cell > right) this.scroller.scrollLeft = x - this.scroller.clientWidth / 2;
  }

  /** Draws with the next frame. */
  redraw() {
    this.frame ||= requestAnimationFrame(() => {
      this.frame = 0;
      this.#draw();
    });
  }

  /** @returns {number} width of a column in CSS pixels */
  get cell() {
    return Math.max(NARROWEST, Math.min(WIDEST, this.scroller.clientWidth / Math.max(this.data?.columns ?? 1, 1)));
  }

  #draw() {
    const { data, canvas, scroller, cell } = this;
    if (!data || !scroller.clientWidth) return;
    const [width, height, ratio] = [scroller.clientWidth, heightOf(data), devicePixelRatio];
    canvas.width = Math.round(width * ratio);
    canvas.height = Math.round(height * ratio);
    canvas.style.width = `${width}px`;
    canvas.style.height = `${height}px`;
    const context = canvas.getContext("2d");
    if (!context) return;
    const first = Math.floor(scroller.scrollLeft / cell);
    const last = Math.min(Math.ceil((scroller.scrollLeft + width) / cell) + 1, data.columns);
    context.scale(ratio, ratio);
    context.translate(first * cell - scroller.scrollLeft, 0);
    const inks = inksOf(canvas);
    drawMap(context, data, { first, last, cell, inks });
    context.strokeStyle = inks.ink;
    this.marked.forEach((column, index) => {
      if (column === null) return;
      context.lineWidth = index + 1;
      context.strokeRect((column - first) * cell + 0.5, 0.5, cell - 1, height - AXIS);
    });
  }

  /** @param {MapData} data */
  #nameRows(data) {
    const wanted = [...(data.curve ? [data.curveLabel ?? ""] : []), ...data.experts];
    if (this.names.children.length === wanted.length) return;
    this.names.replaceChildren(
      ...wanted.map((name, index) => {
        const item = document.createElement("li");
        const isCurve = data.curve && index === 0;
        item.textContent = item.title = name;
        item.style.height = `${isCurve ? CURVE + GAP : rowHeight(data.experts.length)}px`;
        return item;
      }),
    );
  }

  #listen() {
    const { scroller, handlers } = this;
    const columnAt = (/** @type {PointerEvent|MouseEvent} */ event) => {
      const x = event.clientX - scroller.getBoundingClientRect().left + scroller.scrollLeft;
      const column = Math.floor(x / this.cell);
      return this.data && column >= 0 && column < this.data.columns ? column : null;
    };
    scroller.addEventListener("scroll", () => this.redraw(), { passive: true });
    scroller.addEventListener("pointermove", (event) => handlers.onHover(columnAt(event)));
    scroller.addEventListener("pointerleave", () => handlers.onHover(null));
    scroller.addEventListener("click", (event) => {
      const column = columnAt(event);
      if (column !== null) handlers.onPick(column);
    });
    scroller.addEventListener("keydown", (event) => {
      const by = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
      if (by) handlers.onMove(by);
      else if (event.key === "Enter" && this.marked[0] !== null) handlers.onPick(this.marked[0]);
      else return;
      event.preventDefault();
    });
    new ResizeObserver(() => this.data && this.show(this.data)).observe(scroller);
    document.addEventListener("themechange", () => this.redraw());
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
