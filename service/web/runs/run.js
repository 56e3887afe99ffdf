/** One request and what comes back: from a body to a result that fills while the answer streams. */

import { ApiError } from "../server/api.js";
import { perplexityTable } from "../result/likelihood.js";
import { entropyFigure, finished, streaming } from "../result/figures.js";

/**
 * @typedef {import("../server/api.js").Api} Api
 * @typedef {import("../result/result.js").ResultView} ResultView
 * @typedef {import("../form/settings.js").Steering} Steering
 * @typedef {{id: number, text: string}} TokenText
 * @typedef {{title: string, prefix: string, path: string, body: Record<string, any>, steering: Steering,
 *            written: {text: string}|{messages: object[]}|null, promptIds: number[]|null, text: string, view: ResultView}} Run
 *   prefix: of the setting in the form; written: what the prompt's tokens are made of, null where they are not wanted;
 *   text: the answer's, which ends before a stop string and the end-of-text token
 */

const SHOWN_EVERY_MS = 250; // of the figures of an answer that streams

/**
 * @param {Api} api
 * @param {Run} run
 * @param {AbortSignal} signal
 * @returns {Promise<{said: string, refused: string|null}>} for the status line, and the field that was refused
 */
export async function carryOut(api, run, signal) {
  const { view, title } = run;
  const count = () => view.text.rows.length - view.text.prompt;
  try {
    if (run.path === "scalings") await showScalings(api, run, signal);
    else await stream(api, run, signal);
    return { said: `${title}: ${count()} tokens.`, refused: null };
  } catch (error) {
    if (signal.aborted) {
      view.summarize([{ text: `stopped after ${count()} tokens`, tip: "You stopped it, and the server with it." }]);
      return { said: `${title}: stopped.`, refused: null };
    }
    const known = error instanceof ApiError ? error : new ApiError(0, { message: messageOf(error) });
    view.fail(known);
    return { said: `${title}: failed.`, refused: known.param };
  } finally {
    view.flush();
  }
}

/** @type {(api: Api, run: Run, signal: AbortSignal) => Promise<void>} */
async function stream(api, run, signal) {
  const { view } = run;
  await tokenize(api, run, signal);
  const started = performance.now();
  let [begun, shown, reason, complete] = [0, 0, "", false];
  for await (const events of api.events("generate", { ...run.body, stream: true }, signal)) {
    for (const { text, tokens, scalings, finish_reason, usage, seed } of events) {
      run.text += text ?? "";
      if (tokens) view.push(tokens, scalings);
      reason = finish_reason ?? reason;
      if (!usage) continue;
      complete = true;
      view.answer = { seed: run.body.seed ?? seed, finish_reason: reason, usage };
      const seconds = (performance.now() - started) / 1000;
      view.summarize(finished({ usage, seconds, reason, seed: run.body.seed ?? seed, text: view.text }));
    }
    const now = performance.now();
    begun ||= now;
    if (complete || now - shown < SHOWN_EVERY_MS) continue;
    shown = now;
    view.summarize(streaming(view.text.rows.length - view.text.prompt, (now - begun) / 1000));
  }
  if (!complete) throw new ApiError(0, { message: "the answer broke off before its end" });
}

/**
 * The prompt's tokens, before those of the answer. A chat's prompt is what its template makes of the messages.
 * @type {(api: Api, run: Run, signal: AbortSignal) => Promise<void>}
 */
async function tokenize(api, run, signal) {
  if (!run.written) return;
  try {
    const { tokens, token_ids: ids } = await api.json("tokenize", run.written, signal);
    run.promptIds = ids;
    if (run.body.scalings_start === 0) run.view.pushPrompt(tokens);
    if ("messages" in run.written) run.body.prompt = ids;
  } catch (error) {
    if (signal.aborted || "messages" in run.written) throw error; // else the answer can do without, or says why not
  }
}

/** @type {(api: Api, run: Run, signal: AbortSignal) => Promise<void>} */
async function showScalings(api, { body, view }, signal) {
  const answer = await api.json("scalings", body, signal);
  view.answer = { usage: answer.usage, perplexity: answer.perplexity };
  const likely = answer.perplexity?.xlora.logprobs;
  const tokens = answer.tokens.map((/** @type {TokenText} */ token, /** @type {number} */ index) =>
    likely ? { ...token, logprob: likely[index] } : token,
  );
  view.push(tokens, answer.scalings);
  const count = { text: `${tokens.length} tokens, nothing generated`, tip: "The scaling pass alone, over the whole text." };
  view.summarize([count, ...entropyFigure(view.text)]);
  if (answer.perplexity) view.root.append(perplexityTable(answer.perplexity));
}

/**
 * @param {unknown} error
 * @returns {string}
 */
export function messageOf(error) {
  return error instanceof Error ? error.message : String(error);
}
