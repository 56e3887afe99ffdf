/** How likely each setting finds what the others wrote, as a table. Knows the answer of POST /compare, and no server. */

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
  section.setAttribute("aria-label", "Log-likelihood");
  heading.textContent = "Log-likelihood, nats per token";
  hint.className = "hint";
  hint.textContent =
    "How likely each setting finds each text: 0 is certain. The sum over the text is in brackets; " +
    "the setting that finds a text likeliest is bold.";
  const names = outputs.map(({ label }, index) => label ?? String(index));
  const best = outputs.map((_, text) => Math.max(...perToken.map((row) => row[text] ?? -Infinity)));
  table.append(
    row("th", ["judged by", ...outputs.map(({ token_ids: ids }, text) => `text of ${names[text]}, ${ids.length} tokens`)]),
    ...names.map((name, judge) => {
      const cells = outputs.map((_, text) => written(perToken[judge][text], sum[judge][text]));
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
function written(mean, total) {
  return mean === null || total === null ? "–" : `${mean.toFixed(3)} (${total.toFixed(1)})`;
}
