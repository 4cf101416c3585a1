/** What is no answer, or none to its end: one StreamError, thrown by the iteration and nowhere else. */

import assert from "node:assert/strict";
import { test } from "node:test";

import { StreamError, stream } from "../../../chatstream/web/page/chatstream.js";
import { DONE, MESSAGES, all, chunk, data, ending, eventually, fakeFetch, refusing, saying, serve } from "./service.mjs";

/** The answer that a service gives, how far it came, and the error's facts. */
async function failure(t, answer, options) {
  const service = await serve(t, answer);
  const asked = stream({ messages: MESSAGES, url: service.url, ...options });
  const { got, error } = await all(asked);
  assert.ok(error instanceof StreamError, `${error}`);
  assert.ok(error instanceof Error);
  assert.equal(error.name, "StreamError");
  assert.deepEqual([asked.outcome, asked.stopped], ["failed", false]);
  assert.deepEqual(await all(asked), { got: [], error: null }, "thrown once");
  assert.deepEqual(await asked.stop(), { confirmed: false, reason: "ended" });
  assert.deepEqual(service.cancels, []);
  const { code, status, message, retryAfter, detail } = error;
  return { got, error, facts: { code, status, message, retryAfter, detail } };
}

const BUSY = { ok: false, reason: "busy", message: "All places are taken." };

test("a refusal of the service's: its reason, its sentence, when to come back", async (t) => {
  const { got, facts } = await failure(t, refusing(503, BUSY, { "Retry-After": "2" }));
  assert.deepEqual(got, []);
  assert.deepEqual(facts, { code: "busy", status: 503, message: BUSY.message, retryAfter: 2, detail: BUSY });
});

test("a refusal that says how to log in", async (t) => {
  const answer = refusing(401, { reason: "unauthenticated" }, { "WWW-Authenticate": 'Bearer realm="x"' });
  assert.equal((await failure(t, answer)).error.challenge, 'Bearer realm="x"');
  assert.equal((await failure(t, refusing(503, BUSY))).error.challenge, null);
  assert.equal(new StreamError("").challenge, null);
});

for (const [what, answer, code, status, message, detail] of [
  ["a proxy's page", refusing(502, "<h1>Bad Gateway</h1>"), "http", 502, "The service answered 502.", undefined],
  ["an error's event stream", refusing(500, DONE, { "Content-Type": "text/event-stream" }), "http", 500, "The service answered 500.", undefined],
  ["JSON of somebody else", refusing(403, { error: 7 }), "http", 403, "The service answered 403.", { error: 7 }],
  ["JSON that is none", refusing(500, "{", { "Content-Type": "application/json" }), "http", 500, "The service answered 500.", undefined],
  ["JSON null", refusing(500, null), "http", 500, "The service answered 500.", null],
  ["odd types in it", refusing(400, { reason: 7, message: [] }), "http", 400, "The service answered 400.", { reason: 7, message: [] }],
  ["a login page", refusing(200, "<h1>Log in</h1>"), "not_stream", 200, "The service answered no event stream but text/html.", undefined],
  ["an answer in one piece", refusing(200, { choices: [] }), "not_stream", 200,
    "The service answered no event stream but application/json.", { choices: [] }],
  ["nothing", (response) => response.writeHead(204).end(), "not_stream", 204, "The service answered no event stream but nameless.", undefined],
]) {
  test(`no answer but ${what}`, async (t) => {
    const { facts } = await failure(t, answer);
    assert.deepEqual(facts, { code, status, message, retryAfter: null, detail });
  });
}

test("a page that does not end is not read", async (t) => {
  await failure(t, (response) => response.writeHead(500, { "Content-Type": "text/html" }).write("<h1>"));
});

process.env.TZ = "America/New_York"; // dates without a zone are not this one's
const DATE = "Sun, 06 Nov 1994 08:49:37 GMT";

for (const [value, expected, date = DATE] of [
  ["0", 0],
  ["120", 120],
  ["1.5", 1.5],
  ["Sun, 06 Nov 1994 08:50:37 GMT", 60],
  ["Sunday, 06-Nov-94 08:50:37 GMT", 60],
  ["Sun Nov  6 08:50:37 1994", 60],
  ["Sun, 06 Nov 1994 08:48:37 GMT", 0],
  ["Fri, 31 Dec 1999 23:59:59 GMT", 0, ""],
  ["-5", null],
  ["soon", null],
  ["", null],
]) {
  test(`Retry-After: ${value || "empty"}, where the date is ${date || "not said"}`, async (t) => {
    const { facts } = await failure(t, refusing(429, {}, { "Retry-After": value, Date: date }));
    assert.equal(facts.retryAfter, expected);
  });
}

test("no connection", async () => {
  const answer = stream({ messages: MESSAGES, url: "http://127.0.0.1:1/stream" });
  const { got, error } = await all(answer);
  assert.deepEqual([got, error.code, error.status, error.retryAfter], [[], "network", null, null]);
  assert.equal(error.message, "The connection failed.");
  assert.ok(error.cause instanceof TypeError);
  assert.equal(answer.outcome, "failed");
});

test("a connection that ends before the headers", async (t) => {
  const { facts } = await failure(t, (response) => response.destroy());
  assert.equal(facts.code, "network");
});

test("a connection that breaks in the middle: what had come was yielded", async (t) => {
  let response;
  const service = await serve(t, (it) => saying(chunk("a"))((response = it)));
  const answer = stream({ messages: MESSAGES, url: service.url });
  const events = answer[Symbol.asyncIterator]();
  assert.equal((await events.next()).done, false);
  response.destroy();
  const { error } = await all(events);
  assert.deepEqual([error.code, error.status, answer.outcome], ["network", null, "failed"]);
  assert.ok(error.cause instanceof Error);
});

test("a fetch that throws instead of rejecting", async (t) => {
  const thrown = new SyntaxError("no");
  const fetch = () => {
    throw thrown;
  };
  const { error } = await failure(t, () => {}, { fetch });
  assert.deepEqual([error.code, error.cause], ["network", thrown]);
});

const FAULT = { message: "The provider went silent.", type: "upstream_error", code: "upstream_idle" };

for (const [what, said, code, message, detail] of [
  ["the service's event", `event: error\n${data({ error: FAULT })}`, "upstream_idle", FAULT.message, FAULT],
  ["an event named error, without JSON", "event: error\ndata: oh\n\n", "upstream_error", "The provider reported an error.", "oh"],
  ["an event named error, without a code", `event: error\n${data({ error: { message: "oh" } })}`, "upstream_error", "oh", { message: "oh" }],
  ["a provider's error", data({ error: { message: "oh", code: "overloaded" } }), "upstream_error", "oh", { message: "oh", code: "overloaded" }],
  ["a provider's error in a word", data({ error: "oh" }), "upstream_error", "oh", "oh"],
  ["a provider's error without words", data({ error: { code: 7 } }), "upstream_error", "The provider reported an error.", { code: 7 }],
]) {
  test(`an error in the middle: ${what}`, async (t) => {
    const { got, facts } = await failure(t, ending(chunk("a"), said, chunk("never")));
    assert.deepEqual(got.map((event) => event.json().choices[0].delta.content), ["a"]);
    assert.deepEqual(facts, { code, status: 200, message, retryAfter: null, detail });
  });
}

test("a body that goes on after an error is let go", async (t) => {
  let response;
  const { got } = await failure(t, (it) => saying(data({ error: "oh" }))((response = it)));
  assert.deepEqual(got, []);
  response.write(chunk("a"));
  await eventually(() => response.closed, "the connection's end");
});

for (const [what, said] of [
  ["an error that is null", data({ error: null, choices: [] })],
  ["talk of one", chunk('{"error": "oh"}')],
  ["something that looks like one and is no JSON", 'data: {"error": \n\n'],
  ["one that is not the event's own", data({ choices: [{ delta: {}, logprobs: { "error": 1 } }] })],
]) {
  test(`no failure: ${what}`, async (t) => {
    const service = await serve(t, ending(said));
    const { got, error } = await all(stream({ messages: MESSAGES, url: service.url }));
    assert.deepEqual([got.length, error], [1, null]);
  });
}

test("deltas throws what the events would", async (t) => {
  const service = await serve(t, ending(chunk("a"), data({ error: "oh" })));
  const { got, error } = await all(stream({ messages: MESSAGES, url: service.url }).deltas());
  assert.deepEqual([got.length, error.code], [1, "upstream_error"]);
});

test("what fails while nobody iterates is no unhandled rejection, and can be learnt later", async (t) => {
  const rejections = [];
  const note = (reason) => rejections.push(reason);
  process.on("unhandledRejection", note);
  t.after(() => process.off("unhandledRejection", note));
  const service = await serve(t, refusing(503, BUSY));
  const lost = stream({ messages: MESSAGES, url: "http://127.0.0.1:1/stream" });
  const refused = stream({ messages: MESSAGES, url: service.url });
  await eventually(() => lost.outcome && refused.outcome, "both failures");
  await new Promise((resolve) => setImmediate(resolve)); // rejections are looked through after a tick
  assert.deepEqual([lost.outcome, refused.outcome, rejections], ["failed", "failed", []]);
  assert.equal((await all(lost)).error.code, "network");
  assert.equal((await all(refused)).error.code, "busy");
});

test("a stop while a refusal's words are on their way is a stop", async (t) => {
  const service = await serve(t, (response) => {
    response.writeHead(503, { "Content-Type": "application/json" }).write('{"reason": ');
  });
  const responses = [];
  const noting = async (url, init) => responses.push(await fetch(url, init)) && responses.at(-1);
  const answer = stream({ messages: MESSAGES, url: service.url, fetch: noting });
  const reading = all(answer);
  await eventually(() => responses.length, "the headers");
  await answer.stop();
  assert.deepEqual(await reading, { got: [], error: null });
  assert.equal(answer.outcome, "stopped");
});

test("a stop that comes with a failure: the first verdict stands", async () => {
  let fail;
  const { fetch } = fakeFetch();
  const failing = (url, init) => (url.includes("/cancel") ? fetch(url, init) : new Promise((_, reject) => (fail = reject)));
  const answer = stream({ messages: MESSAGES, url: "http://host/stream", fetch: failing });
  void answer.stop();
  fail(new TypeError("network"));
  assert.deepEqual(await all(answer), { got: [], error: null });
  assert.equal(answer.outcome, "stopped");
});

test("an error can be made and told as any other", () => {
  const error = new StreamError("Words.");
  assert.deepEqual([error.code, error.status, error.retryAfter, error.detail], ["http", null, null, undefined]);
  assert.equal("cause" in error, false);
  assert.equal(`${error}`, "StreamError: Words.");
});
