/** Every way of stopping, in every phase: it is quiet here, and the service is told twice. */

import assert from "node:assert/strict";
import { getEventListeners } from "node:events";
import { test } from "node:test";

import { stream } from "../../../chatstream/web/page/chatstream.js";
import { CANCELLED, DONE, MESSAGES, all, chunk, eventually, fakeFetch, refusing, saying, serve } from "./service.mjs";

const silent = () => {}; // an answer whose headers do not come
const streaming = saying(chunk("a") + chunk("b")); // and then nothing

/** A question whose answer is in the middle of `phase`, and somebody who waits for more of it. */
async function begin(t, phase, { cancel, ...options } = {}) {
  const service = await serve(t, phase === "headers" ? silent : phase === "silent" ? saying() : streaming, cancel);
  const answer = stream({ messages: MESSAGES, url: service.url, ...options });
  const events = answer[Symbol.asyncIterator]();
  await eventually(() => service.asked.length, "the question");
  if (phase === "streaming") for (let count = 0; count < 2; count++) await events.next();
  const waiting = events.next();
  waiting.catch(() => {});
  return { service, answer, events, waiting };
}

/** Asserts what is so after every stop. */
async function assertStopped({ service, answer, waiting }, cancels = 1) {
  assert.deepEqual([answer.outcome, answer.stopped], ["stopped", true]);
  assert.deepEqual(await waiting, { done: true, value: undefined });
  assert.deepEqual(await all(answer), { got: [], error: null });
  await eventually(() => service.open.size === 0, "the connection's end");
  await eventually(() => service.cancels.length === cancels, `${cancels} cancels`);
  for (const { method, url, body } of service.cancels) {
    const path = `/api/chat/cancel/${answer.sessionId}?streamId=${answer.streamId}`;
    assert.deepEqual([method, url, body], ["POST", path, ""]);
  }
}

for (const phase of ["headers", "silent", "streaming"]) {
  test(`stop, ${phase}`, async (t) => {
    const scene = await begin(t, phase);
    assert.equal(scene.answer.outcome, null);
    assert.deepEqual(await scene.answer.stop(), { confirmed: true, reason: "cancelled" });
    await assertStopped(scene);
  });
}

test("stop ends the answer at once, not when the cancel is answered", async (t) => {
  let answerCancel;
  const scene = await begin(t, "silent", { cancel: (response) => (answerCancel = () => CANCELLED(response)) });
  let confirmed = false;
  const stopping = scene.answer.stop().then(() => (confirmed = true));
  assert.equal(scene.answer.stopped, true);
  await assertStopped(scene);
  assert.equal(confirmed, false);
  answerCancel();
  await stopping;
});

test("what has come and was not yielded yet is not yielded after a stop", async (t) => {
  const service = await serve(t, streaming);
  const answer = stream({ messages: MESSAGES, url: service.url });
  const got = [];
  for await (const { content } of answer.deltas()) {
    got.push(content);
    void answer.stop();
  }
  assert.deepEqual(got, ["a"]);
  await assertStopped({ service, answer, waiting: answer[Symbol.asyncIterator]().next() });
});

test("stop in the tick in which it was asked: told to the service all the same", async (t) => {
  const service = await serve(t, silent);
  const answer = stream({ messages: MESSAGES, url: service.url });
  const stopping = answer.stop();
  assert.deepEqual(await all(answer), { got: [], error: null });
  assert.equal((await stopping).confirmed, true);
  await eventually(() => service.cancels.length === 1, "the cancel");
});

test("stop where nobody iterates", async (t) => {
  const service = await serve(t, streaming);
  const answer = stream({ messages: MESSAGES, url: service.url });
  await eventually(() => service.asked.length, "the question");
  await answer.stop();
  await assertStopped({ service, answer, waiting: answer[Symbol.asyncIterator]().next() });
});

test("many stops at once and later: one cancel, one result", async (t) => {
  const scene = await begin(t, "streaming");
  const stops = [scene.answer.stop(), scene.answer.stop(), scene.events.return().then(() => scene.answer.stop())];
  const [first, ...others] = await Promise.all(stops);
  for (const other of others) assert.equal(other, first);
  assert.equal(await scene.answer.stop(), first);
  await assertStopped(scene);
});

test("stop after the end: no request", async (t) => {
  const service = await serve(t, saying(chunk("a"), DONE));
  const answer = stream({ messages: MESSAGES, url: service.url });
  await all(answer);
  assert.deepEqual(await answer.stop(), { confirmed: true, reason: "ended" });
  assert.deepEqual([answer.outcome, answer.stopped], ["completed", false]);
  assert.deepEqual(service.cancels, []);
});

for (const [what, cancel, result] of [
  ["cancelled", CANCELLED, { confirmed: true, reason: "cancelled" }],
  ["the abort was faster", refusing(404, { ok: false, reason: "not_found" }), { confirmed: true, reason: "not_found" }],
  ["a worker hangs", refusing(504, { ok: false, reason: "unconfirmed" }), { confirmed: false, reason: "unconfirmed" }],
  ["logged out", refusing(401, { reason: "unauthenticated" }), { confirmed: false, reason: "unauthenticated" }],
  ["no such route", refusing(404, "<h1>404</h1>"), { confirmed: false, reason: "http" }],
  ["a login page", refusing(200, "<h1>Log in</h1>"), { confirmed: false, reason: "http" }],
  ["JSON of somebody else", refusing(200, { cancelled: "yes" }), { confirmed: false, reason: "http" }],
  ["JSON that is none", refusing(200, "{", { "Content-Type": "application/json" }), { confirmed: false, reason: "http" }],
  ["no answer", (response) => response.destroy(), { confirmed: false, reason: "network" }],
]) {
  test(`what a stop resolves to: ${what}`, async (t) => {
    const scene = await begin(t, "streaming", { cancel });
    assert.deepEqual(await scene.answer.stop(), result);
    await assertStopped(scene);
  });
}

test("a cancel that cannot even be tried rejects nothing", async () => {
  const { fetch } = fakeFetch(chunk("a"));
  const failing = (url, init) => {
    if (url.includes("/cancel")) throw new TypeError("no");
    return fetch(url, init);
  };
  const answer = stream({ messages: MESSAGES, url: "http://host/stream", fetch: failing });
  assert.deepEqual(await answer.stop(), { confirmed: false, reason: "network" });
});

/** A question whose cancel is answered when `confirm` is called, in a world whose timers do not fire. */
function slowly(t) {
  const { fetch, calls } = fakeFetch(chunk("a"));
  const timers = new Map();
  t.mock.method(globalThis, "setTimeout", (fire, ms) => timers.set(timers.size, { fire, ms }).size - 1);
  t.mock.method(globalThis, "clearTimeout", (timer) => timers.delete(timer));
  let confirm;
  const slow = (url, init) => {
    const response = fetch(url, init);
    return url.includes("/cancel") ? new Promise((resolve) => (confirm = () => resolve(response))) : response;
  };
  const answer = stream({ messages: MESSAGES, url: "http://host/stream", fetch: slow });
  const [{ init: { signal } }] = calls;
  return { answer, calls, signal, timers, confirm: () => confirm() };
}

test("the cancel goes out first, with keepalive; its answer is the abort's cue", async (t) => {
  const { answer, calls, signal, timers, confirm } = slowly(t);
  const stopping = answer.stop();
  assert.equal(calls[1].url.includes("/cancel/"), true);
  assert.equal(calls[1].init.keepalive, true);
  assert.equal(calls[1].init.signal, undefined, "nothing takes the cancel back");
  assert.equal(signal.aborted, false);
  confirm();
  await stopping;
  assert.deepEqual([signal.aborted, timers.size], [true, 0]);
});

test("a cancel that is not answered soon is not waited for", async (t) => {
  const { answer, signal, timers } = slowly(t);
  void answer.stop();
  const [{ fire, ms }] = timers.values();
  assert.ok(ms <= 50);
  fire();
  assert.equal(signal.aborted, true);
});

test("whoever iterates waits for neither", async (t) => {
  const { answer, signal } = slowly(t);
  const events = answer[Symbol.asyncIterator]();
  await events.next();
  const waiting = events.next();
  void answer.stop();
  assert.deepEqual(await waiting, { done: true, value: undefined });
  assert.equal(signal.aborted, false);
});

test("a page that ends aborts in the same tick, after the cancel", (t) => {
  const { target } = page(t);
  const { answer, calls, signal } = slowly(t);
  let callsAtAbort = 0;
  signal.addEventListener("abort", () => (callsAtAbort = calls.length));
  target.dispatchEvent(new Event("pagehide"));
  assert.deepEqual([answer.stopped, signal.aborted, callsAtAbort], [true, true, 2]);
});

for (const phase of ["headers", "streaming"]) {
  test(`a fetch that knows no signals is left behind, ${phase}`, async () => {
    const { fetch, calls } = fakeFetch(chunk("a"));
    let respond;
    const late = (url, init) =>
      url.includes("/cancel") ? fetch(url, init) : new Promise((resolve) => (respond = () => resolve(fetch(url, init))));
    const answer = stream({ messages: MESSAGES, url: "http://host/stream", fetch: late });
    if (phase === "streaming") respond();
    const events = answer[Symbol.asyncIterator]();
    if (phase === "streaming") await events.next();
    const waiting = events.next();
    await answer.stop();
    assert.deepEqual(await waiting, { done: true, value: undefined });
    if (phase === "headers") respond();
    await eventually(() => calls.includes("body cancelled"), "the body's end");
  });
}

test("a fetch that knows no signals is not waited for by who iterates after the stop", async () => {
  const { fetch } = fakeFetch();
  const never = (url, init) => (url.includes("/cancel") ? fetch(url, init) : new Promise(() => {}));
  const answer = stream({ messages: MESSAGES, url: "http://host/stream", fetch: never });
  await answer.stop();
  assert.deepEqual(await all(answer), { got: [], error: null });
});

const LEAVE = {
  "break": async (items) => {
    for await (const item of items) break;
  },
  "throw": async (items) => {
    await assert.rejects(async () => {
      for await (const item of items) throw new RangeError("the page's own");
    }, RangeError);
  },
  "return before the first next": async (items) => {
    assert.deepEqual(await items[Symbol.asyncIterator]().return(), { done: true, value: undefined });
  },
};

for (const [how, leave] of Object.entries(LEAVE)) {
  for (const what of ["events", "deltas"]) {
    test(`leaving the loop stops: ${how}, ${what}`, async (t) => {
      const service = await serve(t, streaming);
      const answer = stream({ messages: MESSAGES, url: service.url });
      const items = what === "events" ? answer : answer.deltas();
      await leave(items);
      await assertStopped({ service, answer, waiting: items[Symbol.asyncIterator]().next() });
    });
  }
}

for (const what of ["events", "deltas"]) {
  test(`leaving while something is awaited stops at once: ${what}`, async (t) => {
    const service = await serve(t, streaming);
    const answer = stream({ messages: MESSAGES, url: service.url });
    const items = what === "events" ? answer[Symbol.asyncIterator]() : answer.deltas();
    for (let count = 0; count < 2; count++) await items.next();
    const waiting = items.next();
    await items.return();
    await assertStopped({ service, answer, waiting });
  });
}

test("leaving the loop after the last event is a stop: [DONE] has not been seen", async (t) => {
  const service = await serve(t, saying(chunk("a", { finish_reason: "stop" }), DONE));
  const answer = stream({ messages: MESSAGES, url: service.url });
  for await (const event of answer) break;
  assert.equal(answer.outcome, "stopped");
});

test("an outer signal stops, and the answer lets go of it", async (t) => {
  const controller = new AbortController();
  const { signal } = controller;
  const scene = await begin(t, "streaming", { signal });
  controller.abort(new RangeError("the page's own reason"));
  await assertStopped(scene);
  assert.deepEqual(getEventListeners(signal, "abort"), []);
  assert.equal((await scene.answer.stop()).reason, "cancelled");
});

test("a signal that is aborted already: nothing is asked", async () => {
  const { fetch, calls } = fakeFetch(chunk("a"));
  const signal = AbortSignal.abort();
  const answer = stream({ messages: MESSAGES, url: "http://host/stream", signal, fetch });
  assert.deepEqual([answer.outcome, answer.stopped], ["stopped", true]);
  assert.deepEqual(await all(answer), { got: [], error: null });
  assert.deepEqual(await answer.stop(), { confirmed: true, reason: "ended" });
  assert.deepEqual(calls, []);
  assert.deepEqual(getEventListeners(signal, "abort"), []);
});

/** A page, as far as this module sees one: what is thrown at it, and who listens. */
function page(t) {
  const target = new EventTarget();
  globalThis.addEventListener = target.addEventListener.bind(target);
  t.after(() => delete globalThis.addEventListener);
  return { target, listeners: () => getEventListeners(target, "pagehide").length };
}

test("the page's end stops", async (t) => {
  const { target, listeners } = page(t);
  const scene = await begin(t, "streaming");
  assert.equal(listeners(), 1);
  target.dispatchEvent(new Event("pagehide"));
  await assertStopped(scene);
  assert.equal(listeners(), 0);
});

for (const phase of ["headers", "silent", "streaming"]) {
  test(`with stopOnLeave: false the page's end closes the connection, and posts nothing: ${phase}`, async (t) => {
    const { target, listeners } = page(t);
    const scene = await begin(t, phase, { stopOnLeave: false });
    target.dispatchEvent(new Event("pagehide"));
    await assertStopped(scene, 0);
    assert.equal(listeners(), 0);
    assert.equal("stopOnLeave" in JSON.parse(scene.service.asked[0].body), false);
    assert.deepEqual(await scene.answer.stop(), { confirmed: true, reason: "ended" });
    assert.deepEqual(scene.service.cancels, []);
  });
}

test("with stopOnLeave: false a stop is one as ever", async (t) => {
  page(t);
  const scene = await begin(t, "streaming", { stopOnLeave: false });
  assert.deepEqual(await scene.answer.stop(), { confirmed: true, reason: "cancelled" });
  await assertStopped(scene);
});

for (const [how, answer] of [
  ["it completed", saying(DONE)],
  ["it was refused", refusing(429, {})],
  ["it broke off", (response) => response.destroy()],
]) {
  test(`nobody listens to page and signal after the end: ${how}`, async (t) => {
    const { listeners } = page(t);
    const { signal } = new AbortController();
    const service = await serve(t, answer);
    await all(stream({ messages: MESSAGES, url: service.url, signal }));
    assert.deepEqual([listeners(), getEventListeners(signal, "abort").length], [0, 0]);
  });
}
