// OpenAI's Node client against a running server: `node suite.mjs URL PICTURE_URL`, where `openai` can be found.
// Every check is an assert; the process prints one line and exits 0.
import assert from "node:assert/strict";
import { createRequire } from "node:module";
import { pathToFileURL } from "node:url";

const [, , url, picture] = process.argv;
const here = createRequire(process.cwd() + "/");
const { default: OpenAI } = await import(pathToFileURL(here.resolve("openai")).href);
const api = new OpenAI({ baseURL: `${url}/v1`, apiKey: "none", maxRetries: 0 });
const see = [
  { type: "text", text: "What?" },
  { type: "image_url", image_url: { url: picture } },
];
const ask = { model: "duomo", messages: [{ role: "user", content: see }] };

const names = [];
for await (const model of await api.models.list()) names.push(model.id);
assert(names.length > 0);

const whole = await api.chat.completions.create(ask);
const said = whole.choices[0].message;
assert(said.content && said.reasoning_content);
assert.equal(whole.usage.total_tokens, whole.usage.prompt_tokens + whole.usage.completion_tokens);

let text = "";
let usage = null;
const stream = await api.chat.completions.create({
  ...ask,
  stream: true,
  stream_options: { include_usage: true },
});
for await (const chunk of stream) {
  text += chunk.choices[0]?.delta.content ?? "";
  usage = chunk.usage ?? usage;
}
assert.equal(text, said.content);
assert.deepEqual(usage, whole.usage);

const runner = api.chat.completions.stream(ask); // the client's own reader of streams
assert.equal((await runner.finalChatCompletion()).choices[0].message.content, text);

const parameters = { type: "object", properties: { text: { type: "string" } } };
const tools = [{ type: "function", function: { name: "look", parameters } }];
const called = await api.chat.completions.stream({ ...ask, tools, tool_choice: "required" }).finalChatCompletion();
const call = called.choices[0].message.tool_calls[0].function;
assert.equal(call.name, "look");
assert.equal(typeof JSON.parse(call.arguments), "object");

assert((await api.completions.create({ model: "duomo", prompt: "Once", max_tokens: 3 })).choices[0].text);

const answer = await api.responses.create({ model: "duomo", input: "hi" });
assert.equal(answer.output_text, text);
const kinds = [];
for await (const event of await api.responses.create({ model: "duomo", input: "hi", stream: true }))
  kinds.push(event.type);
assert.equal(kinds[0], "response.created");
assert.equal(kinds.at(-1), "response.completed");

const flat = { type: "function", name: "look", parameters, strict: false };
const calling = await api.responses
  .stream({ model: "duomo", input: "hi", tools: [flat], tool_choice: "required" })
  .finalResponse();
assert.equal(calling.output.at(-1).arguments, call.arguments);

const decided = await api.decisions.create({
  model: "duomo",
  input: [{ role: "user", content: [{ type: "input_image", image_url: picture }] }],
  questions: [
    { type: "predicate", instructions: "It is red.", name: "red" },
    { type: "choice", instructions: "What?", choices: [{ value: "cat" }, { value: true }] },
  ],
});
assert.equal(decided.answers[0].name, "red");
assert.equal(decided.answers[1].choice, "cat");

const leaving = await api.chat.completions.create({ ...ask, stream: true });
for await (const _ of leaving) break; // aborts the request
await assert.rejects(api.chat.completions.create({ ...ask, temperature: 9 }), (error) => {
  assert(error instanceof OpenAI.BadRequestError && error.code && error.param === "temperature");
  return true;
});
await assert.rejects(api.models.retrieve("nobody"), OpenAI.NotFoundError);
console.log("openai for Node passed");
