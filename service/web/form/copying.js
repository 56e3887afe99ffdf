/** Copies a text, also where a page of plain http may not write to the clipboard itself. */

import { showSnippet } from "./dialogs.js";

/**
 * @param {string} what  for the message
 * @param {string} text
 * @returns {Promise<string>} a message for the user
 */
export async function copy(what, text) {
  try {
    await navigator.clipboard.writeText(text);
    return `${what} copied.`;
  } catch {
    if (copyBySelection(text)) return `${what} copied.`;
    showSnippet(what, text);
    return `The browser does not let this page copy.`;
  }
}

/** @param {string} text */
function copyBySelection(text) {
  const focused = /** @type {HTMLElement|null} */ (document.activeElement);
  const area = document.createElement("textarea");
  area.value = text;
  area.className = "offscreen";
  area.setAttribute("aria-hidden", "true");
  document.body.append(area);
  area.select();
  const copied = document.execCommand("copy");
  area.remove();
  focused?.focus({ preventScroll: true });
  return copied;
}
