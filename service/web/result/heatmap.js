/**
 * A map in the page: scrolls, follows the end of a growing text, tells which cell is under the pointer.
 *
 * Only the columns in view are drawn, so its cost does not grow with the text.
 */

import { bodyOf, CURVE, drawMap, GAP, heightOf, inksOf, rowAt, rowHeight } from "./drawing.js";

/** @typedef {import("./drawing.js").MapData} MapData */

const [NARROWEST, WIDEST] = [4, 18];

export class HeatMap {
  /**
   * @param {HTMLElement} host
   * @param {string} label  for screen readers
   * @param {{onHover: (column: number|null, row: number|null) => void, onPick: (column: number) => void,
   *          onMove: (by: number) => void}} handlers
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
    const { scroller } = this;
    const following = scroller.scrollLeft + scroller.clientWidth >= scroller.scrollWidth - 2;
    this.data = data;
    this.#nameRows(data);
    scroller.setAttribute("aria-label", `${this.label}: ${data.columns} columns, ${data.names.length} rows`);
    this.spacer.style.width = `${data.columns * this.cell}px`;
    if (following) scroller.scrollLeft = scroller.scrollWidth;
    this.redraw();
  }

  /**
   * @param {number|null} active
   * @param {number|null} picked
   */
  mark(active, picked) {
    this.marked = [active, picked];
    this.scroller.dataset.marked = String(active ?? "");
    this.redraw();
  }

  /** @param {number} column  scrolls there when it is out of view */
  reveal(column) {
    const { scroller, cell } = this;
    const [left, right] = [scroller.scrollLeft, scroller.scrollLeft + scroller.clientWidth];
    const x = column * cell;
    if (x < left || x + cell > right) scroller.scrollLeft = x - scroller.clientWidth / 2;
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
    const fitting = this.scroller.clientWidth / Math.max(this.data?.columns ?? 1, 1);
    return Math.max(this.data?.narrowest ?? NARROWEST, Math.min(WIDEST, fitting));
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
      if (column === null || column < 0) return;
      context.lineWidth = index + 1;
      context.strokeRect((column - first) * cell + 0.5, 0.5, cell - 1, bodyOf(data));
    });
  }

  /** @param {MapData} data */
  #nameRows(data) {
    const wanted = [...(data.curve ? [data.curveLabel ?? ""] : []), ...data.names];
    const known = JSON.stringify(wanted);
    if (this.names.dataset.of === known) return;
    this.names.dataset.of = known;
    const shown = [...(data.curve ? [data.curveLabel ?? ""] : []), ...(data.labels ?? data.names)];
    const height = rowHeight(data);
    this.names.replaceChildren(
      ...wanted.map((name, index) => {
        const item = document.createElement("li");
        const isCurve = data.curve && index === 0;
        item.textContent = height < 13 && !isCurve && index % 2 ? "" : shown[index];
        item.dataset.tip = name;
        item.style.height = `${isCurve ? CURVE + GAP : height}px`;
        return item;
      }),
    );
  }

  #listen() {
    const { scroller, handlers } = this;
    const cellAt = (/** @type {PointerEvent|MouseEvent} */ event) => {
      const box = scroller.getBoundingClientRect();
      const column = Math.floor((event.clientX - box.left + scroller.scrollLeft) / this.cell);
      if (!this.data || column < 0 || column >= this.data.columns) return { column: null, row: null };
      return { column, row: rowAt(this.data, event.clientY - box.top) };
    };
    scroller.addEventListener("scroll", () => this.redraw(), { passive: true });
    scroller.addEventListener("pointermove", (event) => {
      const { column, row } = cellAt(event);
      handlers.onHover(column, row);
    });
    scroller.addEventListener("pointerleave", () => handlers.onHover(null, null));
    scroller.addEventListener("click", (event) => {
      const { column } = cellAt(event);
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
