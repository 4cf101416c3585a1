/** A service that answers as a test says, on a socket of its own, and remembers who asked what. */

import assert from "node:assert/strict";
import { createServer } from "node:http";
import { text } from "node:stream/consumers";

export const MESSAGES = [{ role: "user", content: "Hello" }];
export const DONE = "data: [DONE]\n\n";

/** An event as a provider sends it. */
export function chunk(content, more = {}) {
  return data({ choices: [{ index: 0, delta: { content }, ...more }] });
}

export function data(value) {
  return `data: ${JSON.stringify(value)}\n\n`;
}

/** An answer that sends `said`, and ends only if that is `[DONE]` in the end. */
export function saying(...said) {
  return (response) => {
    response.writeHead(200, { "Content-Type": "text/event-stream; charset=utf-8" });
    response.flushHeaders();
    for (const piece of said) response.write(piece);
    if (said.at(-1) === DONE) response.end();
  };
}

/** An answer that ends after `said`, whatever that is. */
export function ending(...said) {
  return (response) => {
    saying(...said, "\n")(response);
    response.end();
  };
}

export function refusing(status, body, headers = {}) {
  const json = typeof body === "object";
  return (response) => {
    response.writeHead(status, { "Content-Type": json ? "application/json" : "text/html", ...headers });
    response.end(json ? JSON.stringify(body) : body);
  };
}

export const CANCELLED = refusing(200, { ok: true, cancelled: true });

/**
 * Serves for one test, which has to leave no answer open.
 *
 * @param {import("node:test").TestContext} t
 * @param {(response: import("node:http").ServerResponse) => void} answer
 * @param {(response: import("node:http").ServerResponse) => void} cancel
 */
export async function serve(t, answer, cancel = CANCELLED) {
  const service = { url: "", asked: [], cancels: [], open: new Set() };
  const server = createServer(async (request, response) => {
    const { method, url, headers, socket } = request;
    const isCancel = url.startsWith("/api/chat/cancel");
    if (!isCancel) service.open.add(response);
    response.on("close", () => service.open.delete(response));
    const seen = { method, url, headers, socket, body: await text(request) };
    (isCancel ? service.cancels : service.asked).push(seen);
    (isCancel ? cancel : answer)(response);
  });
  await new Promise((listening) => server.listen(0, "127.0.0.1", listening));
  service.url = `http://127.0.0.1:${server.address().port}/api/chat/stream`;
  t.after(async () => {
    await eventually(() => service.open.size === 0, "no answer is left open");
    server.closeAllConnections();
    await new Promise((closed) => server.close(closed));
  });
  return service;
}

/** Waits until something is so. */
export async function eventually(condition, what) {
  for (const deadline = Date.now() + 10_000; !condition(); ) {
    assert.ok(Date.now() < deadline, `not within 10 s: ${what}`);
    await new Promise((resolve) => setTimeout(resolve, 2));
  }
}

/** Everything of an iterator, and what it throws in the end. */
export async function all(items) {
  const got = [];
  try {
    for await (const item of items) got.push(item);
  } catch (error) {
    return { got, error };
  }
  return { got, error: null };
}

/**
 * A `fetch` that is none: it has the question answered with `said`, in a body that goes on until
 * it is cancelled, and takes no notice of signals. What it was called with is in `calls`.
 */
export function fakeFetch(...said) {
  const calls = [];
  const fetch = async function (url, init) {
    calls.push({ url, init, self: this });
    if (url.includes("/cancel")) return Response.json({ ok: true, cancelled: true });
    const body = new ReadableStream({
      start: (controller) => said.forEach((x) => controller.enqueue(new TextEncoder().encode(x))),
      cancel: () => calls.push("body cancelled"),
    });
    return new Response(body, { headers: { "Content-Type": "text/event-stream" } });
  };
  return { fetch, calls };
}
