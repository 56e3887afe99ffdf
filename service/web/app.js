/** The page: what its buttons do, and how a run goes from the form to the results. */

import { Api, ApiError } from "./api.js";
import { askForKey, showSnippet } from "./dialogs.js";
import { RequestForm } from "./form.js";
import { likelihoodTable } from "./likelihood.js";
import { LiveStrip } from "./live.js";
import { ResultView } from "./result.js";
import { describe } from "./settings.js";
import { asCurl, asPython } from "./snippets.js";

/** @typedef {ReturnType<RequestForm["requests"]>[number]} Request */

const DEMO_PROMPT = "What is 88 + 76? Which strand pairs with CTA TCT TAT?\n";
const LOADING_MS = 1000;

/** @param {string} id */
const byId = (id) => /** @type {HTMLElement} */ (document.getElementById(id));
const button = (/** @type {string} */ id) => /** @type {HTMLButtonElement} */ (byId(id));

const api = new Api((refused) =>
  askForKey(refused ? "The server did not accept this key." : "The server asks for a key."),
);
const formElement = /** @type {HTMLFormElement} */ (byId("form"));
const form = new RequestForm(formElement);
/** @type {AbortController|null} */
let running = null;

/** @param {string} text */
function say(text) {
  byId("status").textContent = text;
}

/** Waits for the model, and makes the controls that depend on it. */
async function describeModel() {
  for (;;) {
    try {
      const info = await api.json("info");
      byId("model").textContent = info.model;
      form.setExperts(info.experts);
      say("");
      return info.model;
    } catch (error) {
      const loading = error instanceof ApiError && [0, 503].includes(error.status);
      say(
        loading ? `Waiting for the server: ${error.message}.` : `The model cannot be described: ${messageOf(error)}.`,
      );
      if (!loading) return null;
      await new Promise((resolve) => setTimeout(resolve, LOADING_MS));
    }
  }
}

async function run() {
  if (running || !form.check()) return;
  running = new AbortController();
  const { signal } = running;
  const requests = form.requests();
  history.replaceState(null, "", `#${form.fragment()}`);
  const seed = Math.floor(Math.random() * 2 ** 31); // one for all settings, so that they differ in the gate alone
  const views = requests.map(({ path, body, setting }, index) => {
    const name = setting ? describe(setting.read()) : "Scalings";
    const asked = path === "generate" ? { seed, ...body } : body;
    return {
      setting,
      path,
      body: asked,
      view: new ResultView(requests.length > 1 ? `${"AB"[index]}: ${name}` : name, asked),
    };
  });
  showViews(views.map(({ view }) => view));
  form.mark(null, "");
  button("stop").disabled = false;
  button("run").disabled = true;
  say("Running…");
  const ends = await Promise.all(views.map((one) => runOne(one, signal)));
  if (!form.hasExperts) form.setExperts(views[0].view.text.experts.map((name) => ({ name }))); // /info was refused
  if (views.length > 1 && !signal.aborted) ends.push(await judge(views, signal));
  running = null;
  button("stop").disabled = true;
  button("run").disabled = false;
  say([...ends, views.length > 1 ? compare(views[0].view, views[1].view) : ""].filter(Boolean).join(" "));
}

/**
 * Shows how likely each setting finds the texts that are there.
 * @param {{body: Record<string, any>, setting: Request["setting"], view: ResultView}[]} views
 * @param {AbortSignal} signal
 * @returns {Promise<string>} for the status line: nothing, or why there is no table
 */
async function judge(views, signal) {
  if (!views.every(({ view }) => view.text.rows.length)) return "";
  const settings = views.map(({ setting, view }) => ({
    ...setting?.read(),
    label: view.title,
    token_ids: view.text.rows.map((row) => row.token.id),
  }));
  try {
    const comparison = await api.json("compare", { prompt: views[0].body.prompt, settings }, signal);
    byId("results").append(likelihoodTable(comparison));
    return "";
  } catch (error) {
    return signal.aborted ? "" : `No log-likelihoods: ${messageOf(error)}.`;
  }
}

/** @param {ResultView[]} views */
function showViews(views) {
  const results = byId("results");
  results.replaceChildren(...views.map((view) => view.root));
  results.classList.toggle("comparing", views.length > 1);
  if (results.getBoundingClientRect().top > innerHeight / 2) results.scrollIntoView(); // narrow screen
}

/**
 * @param {{path: string, body: Record<string, any>, setting: Request["setting"], view: ResultView}} one
 * @param {AbortSignal} signal
 * @returns {Promise<string>} how it ended, for the status line
 */
async function runOne({ path, body, setting, view }, signal) {
  try {
    if (path === "scalings") await showScalings(body, view, signal);
    else await stream(body, view, signal);
    return `${view.title}: ${view.text.rows.length} tokens.`;
  } catch (error) {
    if (signal.aborted) {
      view.summarize(`stopped after ${view.text.rows.length} tokens`);
      return `${view.title}: stopped.`;
    }
    view.fail(error instanceof ApiError ? error : new ApiError(0, { message: messageOf(error) }));
    if (error instanceof ApiError) form.mark(error.param, setting?.prefix ?? "");
    return `${view.title}: failed.`;
  } finally {
    view.flush();
  }
}

/**
 * @param {Record<string, any>} body
 * @param {ResultView} view
 * @param {AbortSignal} signal
 */
async function stream(body, view, signal) {
  const started = performance.now();
  let reason = "";
  let complete = false;
  for await (const events of api.events("generate", { ...body, stream: true }, signal)) {
    for (const { tokens, scalings, finish_reason, usage } of events) {
      if (tokens) view.push(tokens, scalings);
      reason = finish_reason ?? reason;
      if (!usage) continue;
      complete = true;
      view.answer = { seed: body.seed, finish_reason: reason, usage };
      const seconds = (performance.now() - started) / 1000;
      const { hits, misses } = usage.lookahead;
      const drafts = hits + misses ? `, lookahead ${hits} of ${hits + misses}` : "";
      view.summarize(
        `${usage.completion_tokens} tokens in ${seconds.toFixed(1)} s, ended by ${reason}, ` +
          `${usage.forward_passes} forwards${drafts}, seed ${body.seed}`,
      );
    }
  }
  if (!complete) throw new ApiError(0, { message: "the answer broke off before its end" });
}

/**
 * @param {Record<string, any>} body
 * @param {ResultView} view
 * @param {AbortSignal} signal
 */
async function showScalings(body, view, signal) {
  const answer = await api.json("scalings", body, signal);
  view.answer = { usage: answer.usage };
  view.push(answer.tokens, answer.scalings);
  view.summarize(`${answer.tokens.length} tokens, nothing generated`);
}

/**
 * @param {ResultView} first
 * @param {ResultView} second
 * @returns {string} where they part
 */
function compare(first, second) {
  const [ours, theirs] = [first, second].map((view) => view.text.rows.map((row) => row.token.id));
  if (!ours.length || !theirs.length) return "";
  const length = Math.max(ours.length, theirs.length);
  const parts = ours.length === length ? ours : theirs;
  const at = parts.findIndex((_, index) => ours[index] !== theirs[index]);
  if (at < 0) return "Both wrote the same.";
  for (const view of [first, second]) view.markDivergence(at);
  return at ? `The same for ${at} tokens, then they part (marked).` : "They differ from the first token on.";
}

/** @param {unknown} error */
function messageOf(error) {
  return error instanceof Error ? error.message : String(error);
}

/**
 * @param {string} title
 * @param {typeof asCurl} write
 */
function snippet(title, write) {
  const calls = form
    .requests()
    .map(({ path, body }) => ({ url: new URL(path, document.baseURI).href, body, withKey: api.key !== "" }));
  return showSnippet(title, calls.map(write).join("\n"));
}

function link() {
  return new URL(`#${form.fragment()}`, document.baseURI).href;
}

function showTheme() {
  const chosen = document.documentElement.dataset.theme;
  const dark = chosen ? chosen === "dark" : matchMedia("(prefers-color-scheme: dark)").matches;
  button("theme-button").textContent = dark ? "Light theme" : "Dark theme";
  document.dispatchEvent(new Event("themechange"));
}

function switchTheme() {
  const theme = button("theme-button").textContent === "Dark theme" ? "dark" : "light";
  document.documentElement.dataset.theme = theme;
  localStorage.setItem("theme", theme);
  showTheme();
}

formElement.addEventListener("submit", (event) => {
  event.preventDefault();
  run();
});
formElement.addEventListener("keydown", (event) => {
  if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) run();
});
button("stop").addEventListener("click", () => running?.abort());
button("copy-curl").addEventListener("click", () => snippet("curl", asCurl));
button("copy-python").addEventListener("click", () => snippet("Python", asPython));
button("copy-link").addEventListener("click", () => showSnippet("Link to these settings", link()));
button("theme-button").addEventListener("click", switchTheme);
button("key-button").addEventListener("click", async () => {
  api.key = (await askForKey("A new key replaces the one in use.")) ?? api.key;
});
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", showTheme);
addEventListener("hashchange", () => form.restore(location.hash.slice(1)));

showTheme();
new LiveStrip(byId("live"), () => api.text("metrics")).run();
const model = await describeModel();
form.restore(location.hash.slice(1));
if (model === "demo" && !location.hash) form.prompt = DEMO_PROMPT;
formElement.inert = false;
