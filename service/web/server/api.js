/** The service's API over fetch: keys, errors, server-sent events. Knows no page. */

/** An answer that was not 2xx, or an error event within a stream. */
export class ApiError extends Error {
  /**
   * @param {number} status  of HTTP; 0 when the server could not be reached
   * @param {{message: string, param?: string|null, code?: string, hint?: string}} detail
   */
  constructor(status, detail) {
    super(detail.message);
    this.status = status;
    this.param = detail.param ?? null;
    this.code = detail.code ?? null;
    this.hint = detail.hint ?? null;
  }
}

const KEY = "xlora-api-key";

export class Api {
  /** @param {(refused: boolean) => Promise<string|null>} askKey  resolves to a key, or null when the user has none */
  constructor(askKey) {
    this.askKey = askKey;
    /** @type {Promise<string|null>|null} */
    this.asking = null;
  }

  get key() {
    return sessionStorage.getItem(KEY) ?? "";
  }

  set key(value) {
    sessionStorage.setItem(KEY, value);
  }

  /**
   * @param {string} path  without a leading slash: relative to the page
   * @returns {Promise<string>}
   */
  async text(path) {
    return (await this.#checked(path, {})).text();
  }

  /**
   * One answer as JSON; a 401 asks the user for a key and tries again.
   * @param {string} path
   * @param {object} [body]  sent by POST where given
   * @param {AbortSignal} [signal]
   * @returns {Promise<any>}
   */
  async json(path, body, signal) {
    return (await this.#authorized(path, body ? { ...post(body), signal } : {})).json();
  }

  /**
   * The events of a streamed answer, in batches as they arrive. Aborting the signal stops the server's work as well.
   * @param {string} path
   * @param {object} body
   * @param {AbortSignal} signal
   * @returns {AsyncGenerator<any[], void>}
   */
  async *events(path, body, signal) {
    const response = await this.#authorized(path, { ...post(body), signal });
    if (!response.body) return;
    const decoder = new TextDecoder();
    let pending = "";
    for await (const bytes of chunksOf(response.body)) {
      const parts = (pending + decoder.decode(bytes, { stream: true })).split("\n\n");
      pending = parts.pop() ?? "";
      const events = parts
        .filter((part) => part !== "data: [DONE]")
        .map((part) => JSON.parse(part.slice("data: ".length)));
      const failed = events.findIndex((event) => event.error);
      if (failed < 0) {
        yield events;
        continue;
      }
      yield events.slice(0, failed);
      throw new ApiError(response.status, events[failed].error);
    }
  }

  /**
   * @param {string} path
   * @param {RequestInit} init
   */
  async #authorized(path, init) {
    for (;;) {
      const sent = this.key;
      try {
        return await this.#checked(path, init);
      } catch (error) {
        if (!(error instanceof ApiError) || error.status !== 401) throw error;
        if (sent === this.key) {
          this.asking ??= this.askKey(sent !== "").finally(() => (this.asking = null));
          const key = await this.asking;
          if (!key) throw error;
          this.key = key;
        }
      }
    }
  }

  /**
   * @param {string} path
   * @param {RequestInit} init
   */
  async #checked(path, init) {
    const headers = new Headers(init.headers);
    if (this.key) headers.set("Authorization", `Bearer ${this.key}`);
    let response;
    try {
      response = await fetch(path, { ...init, headers, cache: "no-store" });
    } catch (error) {
      if (error instanceof DOMException) throw error; // aborted
      throw new ApiError(0, { message: "the server cannot be reached", hint: "is it running?" });
    }
    if (response.ok) return response;
    const answer = await response.json().catch(() => null);
    throw new ApiError(response.status, answer?.error ?? { message: `the server answered ${response.status}` });
  }
}

/**
 * @param {object} body
 * @returns {RequestInit}
 */
function post(body) {
  return { method: "POST", headers: { "Content-Type": "application/json" }, body: JSON.stringify(body) };
}

/**
 * The chunks of a body; not every browser can iterate over a ReadableStream itself.
 * @param {ReadableStream<Uint8Array>} body
 */
async function* chunksOf(body) {
  const reader = body.getReader();
  try {
    for (;;) {
      const { done, value } = await reader.read();
      if (done) return;
      yield value;
    }
  } finally {
    await reader.cancel().catch(() => {}); // the connection may be gone already
  }
}
