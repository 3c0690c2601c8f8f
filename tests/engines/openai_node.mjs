// Does with OpenAI's own Node client what its users do; fails with a stack trace.
//
//     node openai_node.mjs CLIENT_FOLDER BASE_URL KEY all|leave
//
// "leave" breaks out of a long stream, prints a line and lives on until its standard
// input ends: so it is the client that closes the connection, not the end of a process.

import assert from "node:assert/strict";
import { createRequire } from "node:module";

const [folder, baseURL, apiKey, what] = process.argv.slice(2);
const { default: OpenAI } = createRequire(`${folder}/package.json`)("openai");
const client = new OpenAI({ baseURL, apiKey, maxRetries: 0 });
const chat = {
  model: "gemma-270m",
  messages: [{ role: "user", content: "The capital of France is" }],
  max_tokens: 12,
  temperature: 0,
};

async function all() {
  const names = (await client.models.list()).data.map((model) => model.id);
  assert(names.includes("gemma-270m"), names.join());

  const answer = await client.chat.completions.create(chat);
  const text = answer.choices[0].message.content;
  assert(text);
  assert(answer._request_id);
  assert.equal(answer.usage.completion_tokens, 12);

  let streamed = "";
  const options = { stream: true, stream_options: { include_usage: true } };
  let usage = null;
  for await (const chunk of await client.chat.completions.create({
    ...chat,
    ...options,
  })) {
    streamed += chunk.choices[0]?.delta.content ?? "";
    usage = chunk.usage ?? usage;
  }
  assert.equal(streamed, text);
  assert.equal(usage.completion_tokens, 12);

  const vectors = await client.embeddings.create({ model: "minilm", input: "a cat" });
  assert.equal(vectors.data[0].embedding.length, 384);

  await assert.rejects(
    client.chat.completions.create({ ...chat, model: "nope" }),
    (error) => error instanceof OpenAI.NotFoundError && error.code === "model_not_found",
  );
  const stranger = new OpenAI({ baseURL, apiKey: "sk-nobody", maxRetries: 0 });
  await assert.rejects(stranger.models.list(), OpenAI.AuthenticationError);
  console.log("all is well");
}

async function leave() {
  const stream = await client.chat.completions.create({
    ...chat,
    max_tokens: 4000,
    stream: true,
  });
  for await (const chunk of stream) {
    if (chunk.choices[0]?.delta.content) break;
  }
  console.log("left");
  for await (const _ of process.stdin);
}

await { all, leave }[what]();
