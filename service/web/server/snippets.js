/** The same request for a terminal or a program. The key is never part of it: it is read from XLORA_API_KEY. */

/**
 * @typedef {{url: string, body: object, withKey: boolean}} Call
 */

/** Fields of POST /generate that are in the object `xlora` of OpenAI's routes. */
const OURS = ["return_scalings", "scalings_start", "experts", "gate"];

/**
 * A chat as OpenAI's route takes it.
 * @param {object[]} messages
 * @param {Record<string, any>} generation  fields of POST /generate
 * @returns {{path: string, body: object}}
 */
export function chatCall(messages, { logprobs, ...generation }) {
  const entries = Object.entries(generation);
  const xlora = Object.fromEntries(entries.filter(([name]) => OURS.includes(name)));
  const sampling = Object.fromEntries(entries.filter(([name]) => !OURS.includes(name)));
  const likely = logprobs === undefined ? {} : { logprobs: true, top_logprobs: logprobs };
  return { path: "v1/chat/completions", body: { messages, ...sampling, ...likely, xlora } };
}

/**
 * @param {Call} call
 * @returns {string} a shell command
 */
export function asCurl({ url, body, withKey }) {
  const lines = [`curl -s ${shell(url)}`, "-H 'Content-Type: application/json'"];
  if (withKey) lines.push('-H "Authorization: Bearer $XLORA_API_KEY"');
  return [...lines, `-d ${shell(JSON.stringify(body))}`].join(" \\\n  ");
}

/**
 * @param {Call} call
 * @returns {string} a program for Python's standard library
 */
export function asPython({ url, body, withKey }) {
  const headers = ['"Content-Type": "application/json"'];
  if (withKey) headers.push('"Authorization": f"Bearer {os.environ[\'XLORA_API_KEY\']}"');
  return [
    "import json",
    ...(withKey ? ["import os"] : []),
    "import urllib.request",
    "",
    `body = ${python(body, "")}`,
    "request = urllib.request.Request(",
    `    ${JSON.stringify(url)}, json.dumps(body).encode(), {${headers.join(", ")}}`,
    ")",
    "with urllib.request.urlopen(request) as answer:",
    "    print(json.dumps(json.load(answer), indent=2))",
    "",
  ].join("\n");
}

/** @param {string} text */
function shell(text) {
  return `'${text.replaceAll("'", "'\\''")}'`;
}

/**
 * @param {unknown} value  of JSON
 * @param {string} indent
 * @returns {string} a Python literal
 */
function python(value, indent) {
  const inner = `${indent}    `;
  if (value === true) return "True";
  if (value === false) return "False";
  if (value === null) return "None";
  if (Array.isArray(value)) return `[${value.map((item) => python(item, inner)).join(", ")}]`;
  if (typeof value !== "object") return JSON.stringify(value);
  const entries = Object.entries(value ?? {}).map(
    ([key, item]) => `${inner}${JSON.stringify(key)}: ${python(item, inner)},\n`,
  );
  return entries.length ? `{\n${entries.join("")}${indent}}` : "{}";
}
