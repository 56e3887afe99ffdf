/** The API's documentation: fetches the OpenAPI document, with the key where one is asked for, and has it shown. */

import { askForKey } from "./form/dialogs.js";
import { Api } from "./server/api.js";

const host = /** @type {HTMLElement} */ (document.getElementById("api"));
const status = /** @type {HTMLElement} */ (document.getElementById("status"));
const api = new Api((refused) =>
  askForKey(refused ? "The server did not accept this key." : "The server asks for a key."),
);

/** @param {object} spec */
function swagger(spec) {
  Object(window).SwaggerUIBundle({
    spec,
    domNode: host,
    deepLinking: true,
    // Beside this page, where a proxy may have put it under a prefix; with this page's key, unless another is given there.
    requestInterceptor: (/** @type {{url: string, headers: Record<string, string>}} */ request) => {
      const { pathname, search } = new URL(request.url, location.origin);
      const key = api.key ? { Authorization: `Bearer ${api.key}` } : {};
      const url = new URL(`.${pathname}${search}`, document.baseURI).href;
      return { ...request, url, headers: { ...key, ...request.headers } };
    },
  });
}

/** @param {object} spec */
function redoc(spec) {
  Object(window).Redoc.init(spec, { hideDownloadButton: true, nativeScrollbars: true, disableSearch: false }, host);
}

try {
  const spec = await api.json("openapi.json");
  status.hidden = true;
  (host.dataset.shownBy === "redoc" ? redoc : swagger)(spec);
} catch (error) {
  const reason = error instanceof Error ? error.message : String(error);
  status.textContent = `The document cannot be read: ${reason}.`;
}
