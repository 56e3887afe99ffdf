/** What the page works on: the results that are shown, how they look, the conversation, the history, and what runs. */

import { describe } from "../form/settings.js";
import { ResultView } from "../result/result.js";
import { Conversation } from "./chat.js";
import { judge, markDifferences, someAtOnce } from "./compare.js";
import { History } from "./history.js";
import { carryOut } from "./run.js";

/**
 * @typedef {import("./run.js").Run} Run
 * @typedef {import("../result/result.js").Look} Look
 * @typedef {import("../form/form.js").RequestForm} RequestForm
 * @typedef {import("../server/api.js").Api} Api
 * @typedef {import("../form/settings.js").Setting} Setting
 */

export class Workbench {
  /**
   * @param {Api} api
   * @param {RequestForm} form
   * @param {HTMLElement} host  where results are shown
   * @param {{say: (text: string) => void, onRunning: (running: boolean) => void, onRuns: (runs: Run[]) => void,
   *          onColour: (by: string) => void, onEdit: (turn: number|null) => void}} handlers
   * @param {Look} look
   */
  constructor(api, form, host, handlers, look) {
    [this.api, this.form, this.host, this.handlers, this.look] = [api, form, host, handlers, look];
    /** @type {AbortController|null} */
    this.running = null;
    /** @type {Run[]} those that are shown */
    this.shown = [];
    this.transcript = document.createElement("ol");
    this.transcript.className = "chat";
    this.chat = new Conversation(this.transcript, {
      onEdit: (index) => this.edit(index),
      onRetry: (index) => this.#send(index, this.chat.turns[index].message),
    });
    const past = /** @type {HTMLElement} */ (document.getElementById("history"));
    this.history = new History(past, {
      show: (run) => this.#showAgain([run]),
      compare: (runs) => this.#compareAgain(runs),
    });
  }

  /** Does what the form asks for. */
  async run() {
    if (this.running || !this.form.check()) return;
    const { form } = this;
    if (form.tab === "chat") {
      await this.#send(this.chat.editing ?? this.chat.turns.length, form.value("message"));
    } else if (form.tab === "scalings") {
      const body = form.scalings();
      await this.#start([this.#make({ title: "Scalings", prefix: "", path: "scalings", body, steering: {}, written: null })]);
    } else {
      const seed = drawSeed(); // one for all settings, so that they differ in the gate alone
      await this.#start(form.asked.map((setting) => this.#completion(setting, seed)));
    }
  }

  stop() {
    this.running?.abort();
  }

  /** @param {Partial<Look>} look */
  relook(look) {
    this.look = { ...this.look, ...look };
    for (const { view } of this.#inPage) view.relook(this.look);
  }

  /**
   * Takes a message of the conversation back into the form.
   * @param {number|null} index  null: no longer
   */
  edit(index) {
    if (this.running) return;
    this.chat.editing = index;
    this.form.fill("message", index === null ? "" : this.chat.turns[index].message);
    this.chat.render();
    this.handlers.onEdit(index);
  }

  clearChat() {
    if (this.running) return;
    this.chat.turns = [];
    this.edit(null);
    if (this.host.contains(this.transcript)) this.#place([]);
  }

  get #inPage() {
    return [...this.shown, ...this.chat.turns.map(({ run }) => run)];
  }

  /**
   * @param {Omit<Run, "view"|"promptIds"|"text">} about
   * @returns {Run}
   */
  #make(about) {
    const view = new ResultView(about.title, about.body, this.look, this.handlers.onColour);
    return { ...about, promptIds: null, text: "", view };
  }

  /**
   * @param {Setting} setting
   * @param {number} seed
   */
  #completion(setting, seed) {
    const steering = setting.read();
    const prompt = this.form.value("prompt");
    const name = describe(steering);
    const title = this.form.asked.length > 1 ? `${setting.prefix.toUpperCase()}: ${name}` : name;
    const body = { prompt, seed, ...this.form.generation(setting) };
    return this.#make({ title, prefix: setting.prefix, path: "generate", body, steering, written: { text: prompt } });
  }

  /**
   * @param {number} index  of the turn
   * @param {string} message
   */
  async #send(index, message) {
    if (this.running || !this.form.check()) return;
    const [setting] = this.form.asked;
    const messages = this.chat.messages(this.form.value("system"), index, message);
    const steering = setting.read();
    const body = { seed: drawSeed(), ...this.form.generation(setting) };
    const title = `Answer ${index + 1}: ${describe(steering)}`;
    const about = { title, prefix: setting.prefix, path: "generate", body, steering, written: { messages } };
    const run = this.#make(about);
    const replaced = this.chat.turns;
    this.chat.put(index, { message, run });
    this.form.fill("message", "");
    this.handlers.onEdit(null);
    await this.#start([run], true);
    if (run.view.text.answer.length || replaced.length <= index) return;
    this.chat.turns = replaced; // nothing came: what was there is better
    this.chat.render();
  }

  /**
   * @param {Run[]} runs
   * @param {boolean} [chatting]
   */
  async #start(runs, chatting) {
    this.running = new AbortController();
    const { signal } = this.running;
    if (chatting) this.#placeChat();
    else this.#place(runs);
    this.form.mark(null, "");
    this.handlers.onRunning(true);
    this.handlers.say("Running…");
    const ends = await someAtOnce(runs, (run) => this.#carryOut(run, signal));
    this.handlers.onRuns(runs);
    for (const run of runs) if (run.view.text.answer.length) this.history.add(run);
    if (runs.length > 1 && !signal.aborted) ends.push(await this.#compare(runs, signal));
    this.running = null;
    this.handlers.onRunning(false);
    this.handlers.say(ends.filter(Boolean).join(" "));
  }

  /**
   * @param {Run} run
   * @param {AbortSignal} signal
   */
  async #carryOut(run, signal) {
    const { said, refused } = await carryOut(this.api, run, signal);
    if (refused) this.form.mark(refused, run.prefix);
    return said;
  }

  /**
   * @param {Run[]} runs
   * @param {AbortSignal} signal
   * @returns {Promise<string>} for the status line
   */
  async #compare(runs, signal) {
    const marked = markDifferences(runs);
    const { table, said } = await judge(this.api, runs, signal);
    if (table && runs === this.shown) this.host.append(table);
    return [marked, said].filter(Boolean).join(" ");
  }

  /**
   * @param {Run[]} runs  of the history: each gets a view of its own
   * @returns {Run[]}
   */
  #showAgain(runs) {
    const again = runs.map((run, index) => {
      const title = runs.length > 1 ? `${"AB"[index]}: ${run.title.replace(/^[A-H]: /, "")}` : run.title;
      const view = new ResultView(title, run.body, this.look, this.handlers.onColour, run.view.text);
      view.answer = run.view.answer;
      view.summarize(run.view.figures);
      return { ...run, prefix: "", view };
    });
    this.#place(again);
    for (const { view } of again) view.flush();
    return again;
  }

  /** @param {[Run, Run]} runs */
  async #compareAgain(runs) {
    if (this.running) return;
    this.running = new AbortController();
    this.handlers.onRunning(true);
    this.handlers.say("Running…");
    const said = await this.#compare(this.#showAgain(runs), this.running.signal);
    this.running = null;
    this.handlers.onRunning(false);
    this.handlers.say(said);
  }

  /** @param {Run[]} runs */
  #place(runs) {
    this.shown = runs;
    this.host.replaceChildren(...runs.map(({ view }) => view.root));
    this.host.classList.toggle("comparing", runs.length > 1);
    this.#bringIntoView(this.host);
  }

  #placeChat() {
    this.shown = [];
    this.host.replaceChildren(this.transcript);
    this.host.classList.remove("comparing");
    this.#bringIntoView(/** @type {HTMLElement} */ (this.transcript.lastElementChild));
  }

  /** @param {HTMLElement} element  a result that is to come; on a narrow screen it is below the form */
  #bringIntoView(element) {
    if (element.getBoundingClientRect().top > innerHeight / 2) element.scrollIntoView();
  }
}

function drawSeed() {
  return Math.floor(Math.random() * 2 ** 31);
}
