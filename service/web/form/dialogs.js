/** The two dialogs: one asks for a key, one shows a snippet. */

/** @param {string} id */
const byId = (id) => /** @type {HTMLElement} */ (document.getElementById(id));

/**
 * Asks for a key.
 * @param {string} reason
 * @returns {Promise<string|null>} null when the user has closed the dialog
 */
export function askForKey(reason) {
  const dialog = /** @type {HTMLDialogElement} */ (byId("key-dialog"));
  const input = /** @type {HTMLInputElement} */ (byId("key-input"));
  byId("key-reason").textContent = `${reason} It is kept in this tab only and sent as Authorization: Bearer.`;
  input.value = "";
  return new Promise((resolve) => {
    byId("key-form").onsubmit = (event) => {
      event.preventDefault();
      dialog.close(input.value.trim());
    };
    byId("key-cancel").onclick = () => dialog.close("");
    dialog.onclose = () => resolve(dialog.returnValue || null);
    dialog.returnValue = "";
    dialog.showModal();
  });
}

/**
 * Shows a text that the browser does not let the page copy, selected, for the user to copy.
 * @param {string} title
 * @param {string} text
 */
export function showSnippet(title, text) {
  const dialog = /** @type {HTMLDialogElement} */ (byId("snippet-dialog"));
  const area = /** @type {HTMLTextAreaElement} */ (byId("snippet-text"));
  byId("snippet-title").textContent = title;
  area.value = text;
  byId("snippet-close").onclick = () => dialog.close();
  dialog.showModal();
  area.select();
  byId("snippet-note").textContent = "The browser does not let this page copy; the text is selected, press Ctrl+C.";
}
