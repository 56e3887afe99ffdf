/**
 * How likely each setting finds what the others wrote, as a table. Knows the answers of POST /compare and
 * POST /scalings, and no server.
 */

/**
 * @typedef {{outputs: {label: string|null, token_ids: number[]}[],
 *            log_likelihood: {sum: (number|null)[][], per_token: (number|null)[][]}}} Comparison
 */

/**
 * @param {Comparison} comparison
 * @returns {HTMLElement}
 */
export function likelihoodTable({ outputs, log_likelihood: { sum, per_token: perToken } }) {
  const section = document.createElement("section");
  const [heading, hint, table] = ["h2", "p", "table"].map((tag) => document.createElement(tag));
  section.className = "likelihood";
  section.setAttribute("aria-label", "Likelihood and perplexity");
  heading.textContent = "How likely each setting finds each text";
  hint.className = "hint";
  hint.textContent =
    "Perplexity, then the log-likelihood in nats: per token, and over the text in brackets. A perplexity of 1 is " +
    "certain. The setting that finds a text likeliest is bold.";
  const names = outputs.map(({ label }, index) => label ?? String(index));
  const best = outputs.map((_, text) => Math.max(...perToken.map((row) => row[text] ?? -Infinity)));
  table.append(
    row("th", ["judged by", ...outputs.map(({ token_ids: ids }, text) => `text of ${names[text]}, ${ids.length} tokens`)]),
    ...names.map((name, judge) => {
      const cells = outputs.map((_, text) => cellOf(perToken[judge][text], sum[judge][text]));
      const line = row("td", [name, ...cells]);
      outputs.forEach((_, text) => {
        line.children[text + 1].classList.toggle("best", perToken[judge][text] === best[text]);
      });
      return line;
    }),
  );
  section.append(heading, hint, table);
  return section;
}

/**
 * @param {string} tag  of all cells but the first, which names the line
 * @param {string[]} texts
 */
function row(tag, texts) {
  const line = document.createElement("tr");
  texts.forEach((text, index) => {
    const cell = document.createElement(index ? tag : "th");
    if (tag === "th") cell.setAttribute("scope", "col");
    else if (!index) cell.setAttribute("scope", "row");
    cell.textContent = text;
    line.append(cell);
  });
  return line;
}

/**
 * @param {number|null} mean
 * @param {number|null} total
 */
function cellOf(mean, total) {
  if (mean === null || total === null) return "–";
  return `${written(Math.exp(-mean))} · ${mean.toFixed(3)} (${total.toFixed(1)})`;
}

/** @param {number} perplexity */
function written(perplexity) {
  return perplexity < 1000 ? perplexity.toFixed(2) : perplexity.toExponential(1);
}

/**
 * @param {{xlora: {perplexity: number|null}, base: {perplexity: number|null}, experts: Record<string, {perplexity: number|null}>}} found
 *   as POST /scalings answers
 * @returns {HTMLElement}
 */
export function perplexityTable({ xlora, base, experts }) {
  const section = document.createElement("section");
  const [heading, hint, table] = ["h2", "p", "table"].map((tag) => document.createElement(tag));
  section.className = "likelihood";
  section.setAttribute("aria-label", "Perplexity");
  heading.textContent = "Perplexity of the text";
  hint.className = "hint";
  hint.textContent = "Under X-LoRA, under the base model, and under each expert alone with weight 1. The lowest is bold.";
  const all = { "X-LoRA": xlora, "base model": base, ...experts };
  const values = Object.values(all).map(({ perplexity }) => perplexity);
  const cells = values.map((value) => (value === null ? "–" : written(value)));
  const line = row("td", ["perplexity", ...cells]);
  const best = Math.min(...values.map((value) => value ?? Infinity));
  values.forEach((value, index) => line.children[index + 1].classList.toggle("best", value === best));
  table.append(row("th", ["model", ...Object.keys(all)]), line);
  section.append(heading, hint, table);
  return section;
}
