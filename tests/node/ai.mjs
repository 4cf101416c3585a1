// The Vercel AI SDK as a client, told line by line what to do (JSON on stdin), telling what it sees
// (JSON on stdout). Driven by tests/integration/test_openai_node.py.
import { createOpenAICompatible } from "@ai-sdk/openai-compatible";
import { generateText, streamText } from "ai";
import { createInterface } from "node:readline";

const provider = createOpenAICompatible({ name: "here", baseURL: process.argv[2] });
const aborters = new Map();

function tell(name, event, more = {}) {
  console.log(JSON.stringify({ name, event, ...more }));
}

function call({ name, simulate, maxRetries }) {
  const aborter = new AbortController();
  aborters.set(name, aborter);
  return {
    model: provider("m"),
    prompt: "hello",
    maxRetries,
    headers: { "X-Session-Id": name },
    providerOptions: { here: { simulate } },
    abortSignal: aborter.signal,
  };
}

const orders = {
  async stream(order) {
    let text = "";
    const result = streamText({ ...call(order), onError: () => {} });
    for await (const part of result.fullStream) {
      if (part.type === "text-delta") tell(order.name, "text", { text: (text += part.text) });
      if (part.type === "error") throw part.error;
      if (part.type === "abort") return tell(order.name, "aborted", { text });
      if (part.type === "finish") tell(order.name, "end", { text, reason: part.finishReason });
    }
  },
  async generate(order) {
    const { text, finishReason } = await generateText(call(order));
    tell(order.name, "end", { text, reason: finishReason });
  },
  async abort({ name }) {
    aborters.get(name).abort();
  },
};

for await (const line of createInterface({ input: process.stdin })) {
  const order = JSON.parse(line);
  orders[order.do](order).catch((error) =>
    tell(order.name, error.name === "AbortError" ? "aborted" : "error", {
      status: error.statusCode,
      message: error.message,
    }),
  );
}
