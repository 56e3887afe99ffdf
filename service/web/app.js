/** The page: what its buttons do, and what it learns of the model before anything runs. */

import { copy } from "./form/copying.js";
import { askForKey } from "./form/dialogs.js";
import { fillInvitation, fillMenu } from "./form/examples.js";
import { RequestForm } from "./form/form.js";
import { showTips } from "./form/tips.js";
import { Workbench } from "./runs/workbench.js";
import { Api, ApiError } from "./server/api.js";
import { LiveStrip } from "./server/live.js";
import { asCurl, asPython, chatCall } from "./server/snippets.js";

/** @typedef {import("./runs/run.js").Run} Run */

const DEMO_PROMPT = "What is 88 + 76? Which strand pairs with CTA TCT TAT?\n";
const LOADING_MS = 1000;
const MARGIN = 16; // pixels between the bar and the form

/** @param {string} id */
const byId = (id) => /** @type {HTMLElement} */ (document.getElementById(id));
const button = (/** @type {string} */ id) => /** @type {HTMLButtonElement} */ (byId(id));
const select = (/** @type {string} */ id) => /** @type {HTMLSelectElement} */ (byId(id));

const api = new Api((refused) =>
  askForKey(refused ? "The server did not accept this key." : "The server asks for a key."),
);
const formElement = /** @type {HTMLFormElement} */ (byId("form"));
const form = new RequestForm(formElement);
const strip = new LiveStrip(byId("live"), () => api.text("metrics"));
const look = { colour: "lead", group: "layer", prompt: true };
const workbench = new Workbench(api, form, byId("output"), { say, onRunning, onRuns, onColour, onEdit }, look);

/** @param {string} text */
function say(text) {
  byId("status").textContent = text;
}

/** @param {boolean} running */
function onRunning(running) {
  button("stop").disabled = !running;
  button("run").disabled = running;
  byId("invitation").hidden = true;
  byId("tools").hidden = false;
}

/** @param {Run[]} runs  that have ended */
function onRuns(runs) {
  const [{ view }] = runs;
  if (!form.hasExperts && view.text.experts.length) setExperts(view.text.experts.map((name) => ({ name }))); // /info was refused
  const { usage } = Object(view.answer);
  if (usage?.forward_passes && usage.completion_tokens) strip.showLast(usage.completion_tokens / usage.forward_passes);
}

/** @param {string} by */
function onColour(by) {
  select("colour").value = by;
  workbench.relook({ colour: by });
}

/** @param {number|null} turn  whose message is in the form */
function onEdit(turn) {
  byId("editing").hidden = turn === null;
  byId("editing-note").textContent = turn === null ? "" : `Replaces message ${turn + 1} and all that follows.`;
  if (turn !== null) formElement.querySelector("[name=message]")?.scrollIntoView({ block: "nearest" });
  if (form.tab === "chat") /** @type {HTMLElement|null} */ (formElement.querySelector("[name=message]"))?.focus();
}

/** @param {{name: string, description?: string}[]} experts */
function setExperts(experts) {
  form.setExperts(experts);
  const chosen = experts.map(({ name }, index) => new Option(`weight of ${name}`, `expert:${index}`));
  const fixed = [...select("colour").options].filter(({ value }) => !value.startsWith("expert:"));
  select("colour").replaceChildren(fixed[0], ...chosen, ...fixed.slice(1));
  select("colour").value = workbench.look.colour;
}

/** Waits for the model, and makes the controls that depend on it. */
async function describeModel() {
  for (;;) {
    try {
      const info = await api.json("info");
      byId("model").textContent = info.model;
      setExperts(info.experts);
      say("");
      return info.model;
    } catch (error) {
      const loading = error instanceof ApiError && [0, 503].includes(error.status);
      const reason = error instanceof Error ? error.message : String(error);
      say(loading ? `Waiting for the server: ${reason}.` : `The model cannot be described: ${reason}.`);
      if (!loading) return null;
      await new Promise((resolve) => setTimeout(resolve, LOADING_MS));
    }
  }
}

async function offerExamples() {
  const examples = await api.json("examples").catch(() => []);
  fillMenu(select("examples"), examples, (prompt) => form.fill("prompt", prompt));
  fillInvitation(byId("invited"), examples, (prompt) => {
    form.show("generate");
    form.fill("prompt", prompt);
    run();
  });
}

function run() {
  if (!workbench.running) history.replaceState(null, "", `#${form.fragment()}`);
  workbench.run();
}

/** The requests that the form stands for, with all that the page adds but the seed. */
function calls() {
  const of = (/** @type {string} */ path, /** @type {object} */ body) => ({
    url: new URL(path, document.baseURI).href,
    body,
    withKey: api.key !== "",
  });
  if (form.tab === "scalings") return [of("scalings", form.scalings())];
  if (form.tab === "generate") {
    return form.asked.map((setting) => of("generate", { prompt: form.value("prompt"), ...form.generation(setting) }));
  }
  const { chat } = workbench;
  const messages = chat.messages(form.value("system"), chat.editing ?? chat.turns.length, form.value("message"));
  const { path, body } = chatCall(messages, form.generation(form.asked[0]));
  return [of(path, body)];
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

/** @param {KeyboardEvent} event  Ctrl+Enter runs anywhere in the form, Enter alone sends a message */
function onFormKey(event) {
  if (event.key !== "Enter" || event.isComposing) return;
  const { name } = /** @type {HTMLInputElement} */ (event.target);
  if (!(event.ctrlKey || event.metaKey || (name === "message" && !event.shiftKey))) return;
  event.preventDefault();
  run();
}

formElement.addEventListener("submit", (event) => {
  event.preventDefault();
  run();
});
formElement.addEventListener("keydown", onFormKey);
button("stop").addEventListener("click", () => workbench.stop());
button("copy-curl").addEventListener("click", async () => say(await copy("curl", calls().map(asCurl).join("\n"))));
button("copy-python").addEventListener("click", async () => say(await copy("Python", calls().map(asPython).join("\n"))));
button("copy-link").addEventListener("click", async () =>
  say(await copy("Link", new URL(`#${form.fragment()}`, document.baseURI).href)),
);
button("edit-cancel").addEventListener("click", () => workbench.edit(null));
button("new-chat").addEventListener("click", () => workbench.clearChat());
select("colour").addEventListener("change", () => workbench.relook({ colour: select("colour").value }));
select("group").addEventListener("change", () => workbench.relook({ group: select("group").value }));
byId("show-prompt").addEventListener("change", (event) =>
  workbench.relook({ prompt: /** @type {HTMLInputElement} */ (event.target).checked }),
);
button("theme-button").addEventListener("click", switchTheme);
button("key-button").addEventListener("click", async () => {
  api.key = (await askForKey("A new key replaces the one in use.")) ?? api.key;
});
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", showTheme);
addEventListener("hashchange", () => form.restore(location.hash.slice(1)));

// The form is as high as the window allows below the bar, so that its main button is in view.
const bar = /** @type {HTMLElement} */ (document.querySelector(".bar"));
const fit = () => formElement.style.setProperty("--above", `${bar.offsetHeight + MARGIN}px`);
new ResizeObserver(fit).observe(bar);
showTheme();
showTips(byId("tip"));
strip.run();
const model = await describeModel();
form.restore(location.hash.slice(1));
if (model === "demo" && !location.hash) form.fill("prompt", DEMO_PROMPT);
formElement.inert = false;
await offerExamples();
