/** What things mean: the text of `data-tip`, beside whatever the pointer or the focus is on. Escape hides it. */

const GAP = 6;

/** @param {HTMLElement} tip  the one element that shows them, above all others */
export function showTips(tip) {
  /** @type {Element|null} */
  let owner = null;
  const hide = () => {
    owner?.removeAttribute("aria-describedby");
    owner = null;
    tip.hidden = true;
  };
  const show = (/** @type {Event} */ event) => {
    const target = event.target instanceof Element ? event.target.closest("[data-tip]") : null;
    if (target === tip || target === owner) return;
    hide();
    const text = target instanceof HTMLElement ? target.dataset.tip : "";
    if (!target || !text) return;
    owner = target;
    target.setAttribute("aria-describedby", tip.id);
    (target.closest("dialog, main, body > header") ?? document.body).append(tip);
    tip.textContent = text;
    tip.hidden = false;
    place(tip, target.getBoundingClientRect());
  };
  document.addEventListener("pointerover", (event) => tip.contains(/** @type {Node} */ (event.target)) || show(event));
  document.addEventListener("focusin", show);
  document.addEventListener("focusout", hide);
  const follow = () => owner && place(tip, owner.getBoundingClientRect());
  document.addEventListener("scroll", follow, { capture: true, passive: true });
  document.addEventListener("keydown", (event) => event.key === "Escape" && hide());
}

/**
 * Under the box, or above it where there is no room; never beyond the window's sides.
 * @param {HTMLElement} tip
 * @param {DOMRect} box
 */
function place(tip, box) {
  tip.style.left = tip.style.top = "0";
  const { width, height } = tip.getBoundingClientRect();
  const room = document.documentElement.clientWidth - width - GAP;
  tip.style.left = `${Math.max(Math.min(box.left, room), GAP)}px`;
  const below = box.bottom + GAP;
  tip.style.top = `${below + height > innerHeight ? Math.max(box.top - height - GAP, 0) : below}px`;
}
