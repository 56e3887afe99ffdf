/** Vercel's `ai` with @ai-sdk/openai-compatible, told that the server takes schemas. */

import { createOpenAICompatible } from "@ai-sdk/openai-compatible";
import { generateObject, generateText, Output, streamObject, streamText, tool } from "ai";
import { z } from "zod";

globalThis.AI_SDK_LOG_WARNINGS = false;

const QUESTION = "Compute 48 + 87.";
const settings = { name: "xlora", baseURL: process.argv[2], apiKey: "unused", supportsStructuredOutputs: true };
const asking = { model: createOpenAICompatible(settings)("demo"), maxRetries: 0, prompt: QUESTION };
const Animal = z.object({ kind: z.string(), legs: z.number().int(), names: z.array(z.string()) });
const Numbers = z.object({ a: z.number().int(), b: z.number().int() });
const add = tool({ description: "Adds.", inputSchema: Numbers, execute: async ({ a, b }) => a + b });

/** @param {unknown} condition  @param {string} message */
function check(condition, message) {
  if (!condition) throw new Error(message);
}

const features = {
  chat: async () => {
    const { text } = await generateText(asking);
    check(text, "no text");
  },
  streaming: async () => {
    const pieces = [];
    for await (const piece of streamText(asking).textStream) pieces.push(piece);
    check(pieces.length > 3, `no stream: ${JSON.stringify(pieces)}`);
  },
  "structured answer": async () => {
    Animal.parse((await generateObject({ ...asking, schema: Animal })).object);
    Animal.parse((await generateText({ ...asking, output: Output.object({ schema: Animal }) })).output);
    const streamed = streamObject({ ...asking, schema: Animal });
    for await (const part of streamed.partialObjectStream) check(part, "an empty part");
    Animal.parse(await streamed.object);
    const record = z.object({ counts: z.record(z.string(), z.number().int()) });
    record.parse((await generateObject({ ...asking, schema: record })).object);
  },
  "tool call": async () => {
    for (const toolChoice of ["required", { type: "tool", toolName: "add" }]) {
      const { toolCalls, toolResults } = await generateText({ ...asking, tools: { add }, toolChoice });
      Numbers.parse(toolCalls[0].input);
      check(toolResults.length === 1, "no result");
      Numbers.parse((await streamText({ ...asking, tools: { add }, toolChoice }).toolCalls)[0].input);
    }
  },
};

const found = {};
for (const [name, attempt] of Object.entries(features)) {
  try {
    await attempt();
    found[name] = null;
  } catch (error) {
    found[name] = `${error.name}: ${error.message}`.slice(0, 300);
  }
}
console.log(JSON.stringify(found));
