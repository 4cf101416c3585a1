// The design that chatstream began as, in Node: fetch, AbortSignal.any, a map of sessions.
import { once } from "node:events";
import http from "node:http";
import { json } from "node:stream/consumers";

const sessions = new Map();

async function stream(req, res) {
  const body = await json(req);
  const session = body.sessionId ?? crypto.randomUUID();
  const left = new AbortController();
  const cancelled = new AbortController();
  res.on("close", () => left.abort());
  sessions.set(session, cancelled);
  try {
    const answer = await fetch(process.env.UPSTREAM_URL, {
      method: "POST",
      headers: { "Content-Type": "application/json" },
      body: JSON.stringify({ ...body, stream: true }),
      signal: AbortSignal.any([left.signal, cancelled.signal]),
    });
    res.writeHead(answer.status, {
      "Content-Type": "text/event-stream",
      "Cache-Control": "no-cache",
    });
    const reader = answer.body.getReader();
    for (;;) {
      const { done, value } = await reader.read();
      if (done) break;
      if (!res.write(value)) await once(res, "drain", { signal: left.signal });
    }
  } catch (error) {
    if (error.name !== "AbortError") console.error(error);
  } finally {
    if (sessions.get(session) === cancelled) sessions.delete(session);
    res.end();
  }
}

function cancel(res, session) {
  const found = sessions.get(session);
  found?.abort();
  const answer = JSON.stringify({ ok: Boolean(found) });
  res.writeHead(found ? 200 : 404, {
    "Content-Type": "application/json",
    "Content-Length": answer.length,
  });
  res.end(answer);
}

const server = http.createServer((req, res) => {
  const path = req.url.split("/").slice(1);
  if (req.method === "POST" && req.url === "/api/chat/stream") stream(req, res);
  else if (req.method === "POST" && path[2] === "cancel") req.resume() && cancel(res, path[3]);
  else res.writeHead(404, { "Content-Length": 0 }).end();
});
server.listen({ port: Number(process.env.PORT), host: "127.0.0.1", backlog: 4096 });
process.on("SIGTERM", () => process.exit(0));
