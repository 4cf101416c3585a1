/** A question and its answer: what is sent, what is yielded, and how it is said to have ended. */

import assert from "node:assert/strict";
import { getEventListeners } from "node:events";
import { test } from "node:test";

import { stream } from "../../../chatstream/web/page/chatstream.js";
import { DONE, MESSAGES, all, chunk, data, ending, eventually, fakeFetch, saying, serve } from "./service.mjs";

test("the question: its own fields, the names, and everything that is not for this module", async (t) => {
  const service = await serve(t, saying(DONE));
  const answer = stream({
    messages: MESSAGES, model: "m", temperature: 0, sessionId: "chat", streamId: "one",
    url: service.url, cancelUrl: "http://127.0.0.1:1/", headers: { "X-CSRFToken": "token" },
    credentials: "omit", signal: new AbortController().signal, fetch: globalThis.fetch,
  });
  await all(answer);
  const [{ method, url, headers, body }] = service.asked;
  assert.deepEqual([method, url], ["POST", "/api/chat/stream"]);
  assert.deepEqual(
    [headers["content-type"], headers.accept, headers["x-csrftoken"]],
    ["application/json", "text/event-stream", "token"],
  );
  const asked = { messages: MESSAGES, model: "m", temperature: 0, sessionId: "chat", streamId: "one" };
  assert.deepEqual(JSON.parse(body), asked);
});

test("it is asked at once, before anybody iterates", async (t) => {
  const service = await serve(t, saying(chunk("a")));
  const answer = stream({ messages: MESSAGES, url: service.url });
  await eventually(() => service.asked.length === 1, "the question");
  await answer.stop();
});

test("an answer has its names from the first moment, and sends them", async (t) => {
  const service = await serve(t, saying(DONE));
  const answer = stream({ messages: MESSAGES, url: service.url, sessionId: null });
  const { sessionId, streamId } = answer;
  for (const name of [sessionId, streamId]) assert.match(name, /^[A-Za-z0-9._:-]{32,128}$/);
  assert.notEqual(sessionId, streamId);
  await all(answer);
  const { messages, ...names } = JSON.parse(service.asked[0].body);
  assert.deepEqual(names, { sessionId, streamId });
});

for (const [where, crypto] of Object.entries({
  "outside secure contexts": { getRandomValues: (bytes) => globalThis.Buffer.from(bytes.buffer).fill(7) && bytes },
  "in Node 18": undefined,
})) {
  test(`names without randomUUID: ${where}`, (t) => {
    const before = Object.getOwnPropertyDescriptor(globalThis, "crypto");
    Object.defineProperty(globalThis, "crypto", { value: crypto, configurable: true });
    t.after(() => Object.defineProperty(globalThis, "crypto", before ?? { value: undefined }));
    const { fetch } = fakeFetch();
    const names = [1, 2].map(() => stream({ messages: MESSAGES, url: "http://host/", fetch }).streamId);
    for (const name of names) assert.match(name, /^[0-9a-f]{32}$/);
    if (crypto) assert.equal(names[0], "07".repeat(16), "the platform's own random bytes");
    else assert.notEqual(names[0], names[1]);
  });
}

test("events come as they are, less [DONE]", async (t) => {
  const service = await serve(t, saying(": ping\n\n", "id: 7\nevent: usage\n", 'data: {"a":1}\n\n', DONE));
  const answer = stream({ messages: MESSAGES, url: service.url });
  assert.equal(answer.outcome, null);
  const { got, error } = await all(answer);
  assert.equal(error, null);
  assert.deepEqual(got.map((x) => [x.type, x.data, x.lastEventId, x.json()]), [["usage", '{"a":1}', "7", { a: 1 }]]);
  assert.deepEqual([answer.outcome, answer.stopped], ["completed", false]);
});

test("each event is there when it was sent, and not with the next", async (t) => {
  let say;
  const service = await serve(t, (response) => (saying(chunk("a"))(response), (say = (x) => response.end(x))));
  const events = stream({ messages: MESSAGES, url: service.url })[Symbol.asyncIterator]();
  assert.equal((await events.next()).value.json().choices[0].delta.content, "a");
  say(chunk("b") + DONE);
  assert.equal((await events.next()).value.json().choices[0].delta.content, "b");
  assert.deepEqual(await events.next(), { done: true, value: undefined });
  assert.deepEqual(await events.next(), { done: true, value: undefined });
});

for (const [how, said, outcome] of [
  ["[DONE]", [chunk("a"), DONE], "completed"],
  ["[DONE] alone", [DONE], "completed"],
  ["[DONE] with spaces, as the service takes it", ["data:  [DONE] \n\n"], "completed"],
  ["a finish_reason", [chunk("a"), chunk("", { finish_reason: "stop" })], "completed"],
  ["a finish_reason, and usage after it", [chunk("a", { finish_reason: "length" }), data({ choices: [] })], "completed"],
  ["no finish_reason", [chunk("a", { finish_reason: null })], "ended"],
  ["talk of one", [chunk('"finish_reason":"stop"')], "ended"],
  ["one that is not the choice's", [data({ choices: [{ delta: { "finish_reason": "stop" } }] })], "ended"],
  ["neither", [chunk("a")], "ended"],
  ["nothing at all: cancelled before the headers", [], "ended"],
]) {
  test(`the end after ${how}: ${outcome}`, async (t) => {
    const service = await serve(t, ending(...said));
    const answer = stream({ messages: MESSAGES, url: service.url });
    const { got, error } = await all(answer);
    assert.deepEqual([error, answer.outcome, answer.stopped], [null, outcome, false]);
    assert.equal(got.length, said.filter((x) => !x.includes("[DONE]")).length);
    assert.deepEqual(service.cancels, []);
  });
}

test("an answer without a body is over", async () => {
  const headers = { "Content-Type": "text/event-stream" };
  const answer = stream({ messages: MESSAGES, url: "http://host/", fetch: async () => new Response(null, { headers }) });
  assert.deepEqual(await all(answer), { got: [], error: null });
  assert.equal(answer.outcome, "ended");
});


test("after [DONE] nothing is yielded, whatever comes; a body that goes on is let go", async (t) => {
  let said;
  const service = await serve(t, (response) => (saying(chunk("a"), DONE + chunk("b"))((said = response))));
  const answer = stream({ messages: MESSAGES, url: service.url });
  assert.equal((await all(answer)).got.length, 1); // nobody waits for the body's end
  assert.equal(answer.outcome, "completed");
  said.write(chunk("c"));
  await eventually(() => said.closed, "the connection's end");
  assert.deepEqual(service.cancels, []);
});

test("the connection of an answer that completed serves other questions", async (t) => {
  let end;
  const service = await serve(t, (response) => {
    end = () => response.end(); // [DONE] has been read before the body's end comes
    saying(chunk("a"), `${DONE}: `)(response);
  });
  for (let count = 0; count < 5; count++) {
    await all(stream({ messages: MESSAGES, url: service.url }));
    end();
    await eventually(() => service.open.size === 0, "the answer's end");
  }
  assert.ok(new Set(service.asked.map(({ socket }) => socket)).size < 5, "as many connections as questions");
});

test("who does not read holds the answer up: nothing is gathered", async (t) => {
  const block = chunk("x".repeat(65536));
  let written = 0;
  const service = await serve(t, (response) => {
    const more = (gone) => gone || ((written += block.length), setImmediate(() => response.write(block, more)));
    saying()(response);
    more();
  });
  const answer = stream({ messages: MESSAGES, url: service.url });
  await answer[Symbol.asyncIterator]().next();
  for (let before = 0; before !== written && written < 1e8; await new Promise((go) => setTimeout(go, 100))) before = written;
  assert.ok(written < 32e6, `${written} bytes are on their way to somebody who does not read`);
  await answer.stop();
});

test("deltas: the text, and what is thought before it", async (t) => {
  const service = await serve(t, saying(
    data({ choices: [{ delta: { role: "assistant", content: "" } }] }),
    data({ choices: [{ delta: { reasoning_content: "Hm. ", content: null } }] }),
    chunk("Yes"),
    data({ choices: [{ index: 0, delta: { content: ", " } }, { index: 1, delta: { content: "No" } }] }),
    data({ choices: [{ index: 1, delta: { content: "No" } }] }),
    data({ choices: [], usage: { total_tokens: 3 } }),
    ...["null", "7", "[]", "no JSON", '{"choices": {}}', '{"choices": [null]}', '{"choices": [{}]}',
      '{"choices": [{"delta": {"content": 7, "reasoning_content": []}}]}'].map((x) => `data: ${x}\n\n`),
    chunk("indeed.", { finish_reason: "stop" }),
    DONE,
  ));
  const answer = stream({ messages: MESSAGES, url: service.url });
  const { got, error } = await all(answer.deltas());
  assert.deepEqual([error, answer.outcome], [null, "completed"]);
  assert.deepEqual(got, [
    { content: "", reasoning: "Hm. " },
    { content: "Yes", reasoning: "" },
    { content: ", ", reasoning: "" },
    { content: "indeed.", reasoning: "" },
  ]);
});

test("events are iterated once, by however many loops", async (t) => {
  const service = await serve(t, saying(chunk("a") + chunk("b"), DONE));
  const answer = stream({ messages: MESSAGES, url: service.url });
  await answer[Symbol.asyncIterator]().next();
  assert.deepEqual((await all(answer.deltas())).got, [{ content: "b", reasoning: "" }]);
  assert.deepEqual((await all(answer)).got, []);
});

test("nexts that do not wait for each other get the events in turn", async (t) => {
  const service = await serve(t, saying(chunk("a") + chunk("b"), DONE));
  const events = stream({ messages: MESSAGES, url: service.url }).deltas();
  const got = await Promise.all([events.next(), events.next(), events.next()]);
  assert.deepEqual(got.map((x) => x.value?.content), ["a", "b", undefined]);
});

/** Where a question and its cancel go; `document` is the page's. */
async function addresses(options, document) {
  globalThis.document = document;
  try {
    const { fetch, calls } = fakeFetch();
    await stream({ messages: MESSAGES, sessionId: "a:b", streamId: "one", fetch, ...options }).stop();
    return calls.filter((call) => call.url).map((call) => call.url);
  } finally {
    delete globalThis.document;
  }
}

const HERE = new URL("../../../chatstream/web/page/", import.meta.url).href;

for (const [what, options, document, urls] of [
  ["beside the module", {}, undefined, [`${HERE}stream`, `${HERE}cancel/a%3Ab?streamId=one`]],
  ["beside the module, in a page elsewhere", {}, { baseURI: "https://host/page" },
    [`${HERE}stream`, `${HERE}cancel/a%3Ab?streamId=one`]],
  ["beside url", { url: "https://host/x/stream?a=b#c" }, undefined,
    ["https://host/x/stream?a=b#c", "https://host/x/cancel/a%3Ab?streamId=one"]],
  ["relative to the page", { url: "/x/stream", cancelUrl: "stop" }, { baseURI: "https://host/app/page" },
    ["https://host/x/stream", "https://host/app/stop/a%3Ab?streamId=one"]],
  ["with a slash", { url: "https://host/s", cancelUrl: new URL("https://host/c/") }, undefined,
    ["https://host/s", "https://host/c/a%3Ab?streamId=one"]],
  ["with a query", { url: "https://host/s", cancelUrl: "https://host/c?key=1" }, undefined,
    ["https://host/s", "https://host/c/a%3Ab?key=1&streamId=one"]],
]) {
  test(`addresses: ${what}`, async () => assert.deepEqual(await addresses(options, document), urls));
}

test("a given URL object is left as it is", async () => {
  const cancelUrl = new URL("https://host/c/");
  await addresses({ url: "https://host/s", cancelUrl });
  assert.equal(cancelUrl.href, "https://host/c/");
});

test("credentials and headers go with both requests; fetch is called as a function", async () => {
  const { fetch, calls } = fakeFetch();
  const options = { messages: MESSAGES, url: "https://host/stream", fetch };
  await stream({ ...options, headers: [["X-CSRFToken", "token"]], credentials: "include" }).stop();
  await stream(options).stop();
  const [asked, cancelled, askedPlainly, cancelledPlainly] = calls.filter((call) => call.url);
  for (const { init, self } of [asked, cancelled]) {
    assert.deepEqual([init.method, init.credentials, self], ["POST", "include", undefined]);
    assert.equal(new Headers(init.headers).get("X-CSRFToken"), "token");
  }
  assert.equal(new Headers(cancelled.init.headers).get("Content-Type"), null, "a cancel has no body");
  for (const { init } of [askedPlainly, cancelledPlainly]) assert.equal(init.credentials, "same-origin");
});

test("what cannot become a request is thrown at once, and leaves nothing behind", () => {
  const { signal } = new AbortController();
  const circular = {};
  circular.self = circular;
  for (const bad of [{ url: "not absolute" }, { headers: { "a b": "c" } }, { circular }, { cancelUrl: "http://" }]) {
    const { fetch, calls } = fakeFetch();
    const options = { messages: MESSAGES, url: "https://host/stream", signal, fetch, ...bad };
    assert.throws(() => stream(options), TypeError, Object.keys(bad)[0]);
    assert.deepEqual(calls, []);
  }
  assert.deepEqual(getEventListeners(signal, "abort"), []);
});
