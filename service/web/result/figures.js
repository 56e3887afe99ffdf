/** Figures that say what they mean, to the pointer and to the keyboard; and what an answer cost, as such figures. */

/** @typedef {{text: string, tip: string}} Figure */

/**
 * @param {HTMLElement} host
 * @param {Figure[]} figures
 */
export function showFigures(host, figures) {
  const focused = [...host.children].indexOf(/** @type {Element} */ (document.activeElement));
  host.replaceChildren(
    ...figures.map(({ text, tip }) => {
      const button = document.createElement("button");
      [button.type, button.className, button.textContent, button.dataset.tip] = ["button", "figure", text, tip];
      return button;
    }),
  );
  if (focused >= 0) /** @type {HTMLElement|undefined} */ (host.children[focused])?.focus({ preventScroll: true });
}

/**
 * While an answer streams.
 * @param {number} tokens
 * @param {number} seconds  since its first token
 * @returns {Figure[]}
 */
export function streaming(tokens, seconds) {
  const rate = seconds > 0 && tokens > 1 ? ((tokens - 1) / seconds).toFixed(0) : "–";
  return [
    { text: `${tokens} tokens so far`, tip: "Tokens of the answer that have come." },
    { text: `${rate} tokens/s`, tip: "Tokens of this answer per second, since its first one came." },
  ];
}

/**
 * @param {{usage: Record<string, any>, seconds: number, reason: string, seed: number, text: import("../gate/gate.js").GatedText}} answer
 * @returns {Figure[]}
 */
export function finished({ usage, seconds, reason, seed, text }) {
  const { completion_tokens: tokens, forward_passes: passes, prompt_tokens: prompt } = usage;
  const { lookahead = [], prompt_lookup: copied = [] } = usage.drafts ?? {};
  const figures = [
    { text: `${tokens} tokens`, tip: `Tokens of the answer; the prompt has ${prompt ?? text.prompt}.` },
    { text: `${seconds.toFixed(1)} s`, tip: "From the request to the last token, as this page has seen it." },
    { text: `${(tokens / Math.max(seconds, 0.001)).toFixed(0)} tokens/s`, tip: "Tokens of the answer by those seconds." },
    { text: `ended by ${reason}`, tip: "stop: the end-of-text token or a stop string; length: max tokens or the context; timeout: the server's time limit." },
    { text: `${passes} forwards`, tip: "Forward passes of the model that this answer took part in." },
  ];
  if (passes) {
    const rate = (tokens / passes).toFixed(2);
    figures.push({ text: `${rate} tokens per forward`, tip: "Tokens by forward passes, the prompt's included: 0.5 would be two passes for every token; above 1, drafts came true that brought several tokens in one pass." });
  }
  figures.push(
    ...draftsFigure("lookahead", lookahead, "Tokens that the scaling pass drafted ahead, and that came true"),
    ...draftsFigure("copied", copied, "Tokens that were drafted from earlier text, and that came true"),
  );
  figures.push(...entropyFigure(text), { text: `seed ${seed}`, tip: "With it and the same settings the answer comes out the same." });
  return figures;
}

/**
 * @param {string} source
 * @param {{depth: number, drafted: number, accepted: number}[]} drafts  by depth
 * @param {string} meaning
 * @returns {Figure[]}
 */
function draftsFigure(source, drafts, meaning) {
  const drafted = drafts.reduce((sum, one) => sum + one.drafted, 0);
  if (!drafted) return [];
  const accepted = drafts.reduce((sum, one) => sum + one.accepted, 0);
  const each = drafts.map((one) => `${one.accepted} of ${one.drafted} at depth ${one.depth}`).join(", ");
  return [{ text: `${source} ${accepted} of ${drafted}`, tip: `${meaning}, so that the work done on them was kept: ${each}.` }];
}

/**
 * @param {import("../gate/gate.js").GatedText} text
 * @returns {Figure[]}
 */
export function entropyFigure(text) {
  const tokens = text.rows.length - text.prompt;
  if (!tokens || text.experts.length < 2 || text.unled === tokens) return [];
  const share = (100 * text.entropies) / tokens / text.maxEntropy;
  const most = `ln ${text.experts.length} = ${text.maxEntropy.toFixed(2)} nats`;
  return [
    {
      text: `entropy ${share.toFixed(0)} % of ln ${text.experts.length}`,
      tip: `How undecided the gate was: the mean of the entropies of all sites at all tokens, as a share of ${most}, the most there can be.`,
    },
  ];
}
