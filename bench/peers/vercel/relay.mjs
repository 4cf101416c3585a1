// The Vercel AI SDK on node:http: streamText, stopped by the client's leaving.
import { createOpenAICompatible } from "@ai-sdk/openai-compatible";
import { streamText } from "ai";
import http from "node:http";
import { json } from "node:stream/consumers";

const provider = createOpenAICompatible({
  name: "provider",
  baseURL: process.env.UPSTREAM_URL.replace("/chat/completions", ""),
});

const server = http.createServer(async (req, res) => {
  const { messages, model, simulate } = await json(req);
  const left = new AbortController();
  res.on("close", () => left.abort());
  const result = streamText({
    model: provider(model),
    messages,
    providerOptions: { provider: { simulate } },
    abortSignal: left.signal,
    onError: ({ error }) => console.error(error),
  });
  result.pipeUIMessageStreamToResponse(res);
});
server.listen({ port: Number(process.env.PORT), host: "127.0.0.1", backlog: 4096 });
process.on("SIGTERM", () => process.exit(0));
