/** Several answers beside each other: where they differ, and how likely each setting finds each text. */

import { differences } from "../gate/diff.js";
import { likelihoodTable } from "../result/likelihood.js";
import { messageOf } from "./run.js";

/**
 * @typedef {import("./run.js").Run} Run
 * @typedef {import("../server/api.js").Api} Api
 */

const AT_ONCE = 4; // streams: browsers have six connections for a server, and the page needs some itself

/**
 * @template T, R
 * @param {T[]} items
 * @param {(item: T) => Promise<R>} work
 * @returns {Promise<R[]>} in the items' order
 */
export async function someAtOnce(items, work) {
  /** @type {R[]} */
  const done = [];
  let next = 0;
  const worker = async () => {
    for (let index = next++; index < items.length; index = next++) done[index] = await work(items[index]);
  };
  await Promise.all(Array.from({ length: AT_ONCE }, worker));
  return done;
}

/**
 * Marks all tokens that differ from the first text, and in the first those that differ from any other.
 * @param {Run[]} runs
 * @returns {string} in a sentence for each
 */
export function markDifferences(runs) {
  const ids = runs.map(({ view }) => view.text.answer.map(({ token }) => token.id));
  if (!ids.every((one) => one.length)) return "";
  const said = [];
  for (let other = 1; other < runs.length; other += 1) {
    const [ours, theirs] = differences(ids[0], ids[other]);
    runs[0].view.markDifferences(ours);
    runs[other].view.markDifferences(theirs);
    const name = letterOf(runs[other], other);
    const same = ids[other].length - theirs.length;
    said.push(
      ours.length + theirs.length
        ? `${name} shares ${same} of its ${ids[other].length} tokens with ${letterOf(runs[0], 0)}; the others are marked.`
        : `${name} wrote the same.`,
    );
  }
  return said.join(" ");
}

/**
 * @param {Run} run
 * @param {number} index
 */
function letterOf(run, index) {
  return (run.prefix || "abcdefgh"[index]).toUpperCase();
}

/**
 * How likely each setting finds the texts that are there.
 * @param {Api} api
 * @param {Run[]} runs  of one prompt
 * @param {AbortSignal} signal
 * @returns {Promise<{table: HTMLElement|null, said: string}>} said: why there is no table
 */
export async function judge(api, runs, signal) {
  if (!runs.every(({ view }) => view.text.answer.length)) return { table: null, said: "" };
  const [{ promptIds, body }] = runs;
  const prompts = new Set(runs.map((run) => JSON.stringify(run.promptIds ?? run.body.prompt)));
  if (prompts.size > 1) return { table: null, said: "No likelihoods: the prompts differ." };
  const settings = runs.map(({ steering, view }) => ({
    ...steering,
    label: view.title,
    token_ids: view.text.answer.map(({ token }) => token.id),
  }));
  try {
    const comparison = await api.json("compare", { prompt: promptIds ?? body.prompt, settings }, signal);
    return { table: likelihoodTable(comparison), said: "" };
  } catch (error) {
    return { table: null, said: signal.aborted ? "" : `No likelihoods: ${messageOf(error)}.` };
  }
}
