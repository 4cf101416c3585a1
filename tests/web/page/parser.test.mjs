/** Bytes to events: each rule of the standard, and that it does not matter how the bytes arrive. */

import assert from "node:assert/strict";
import { test } from "node:test";

import { EventStreamParser, StreamEvent } from "../../../chatstream/web/page/chatstream.js";

const encode = (text) => new TextEncoder().encode(text);
const plain = ({ type, data, lastEventId }) => ({ type, data, lastEventId });
const message = (data, lastEventId = "") => ({ type: "message", data, lastEventId });

/** The events of a stream that arrives in these chunks. */
function eventsOf(...chunks) {
  const parser = new EventStreamParser();
  return chunks.flatMap((chunk) => parser.feed(typeof chunk === "string" ? encode(chunk) : chunk)).map(plain);
}

const RULES = {
  "nothing": ["", []],
  "an event": ["data: a\n\n", [message("a")]],
  "two events": ["data: a\n\ndata: b\n\n", [message("a"), message("b")]],
  "CRLF": ["data: a\r\n\r\ndata: b\r\n\r\n", [message("a"), message("b")]],
  "CR": ["data: a\r\rdata: b\r\r", [message("a"), message("b")]],
  "line ends mixed": ["data: a\r\n\ndata: b\r\r\ndata: c\n\r", ["a", "b", "c"].map((x) => message(x))],
  "LF CR are two ends": ["data: a\n\rdata: b\n\n", [message("a"), message("b")]],
  "lines are joined": ["data: a\ndata: b\ndata\ndata: c\n\n", [message("a\nb\n\nc")]],
  "one newline is taken off": ["data\ndata\n\n", [message("\n")]],
  "an empty line of data is data": ["data:\n\n", [message("")]],
  "data without a colon": ["data\n\n", [message("")]],
  "no data, no event": ["event: ping\nid: 1\n\n\n\n", []],
  "a type": ["event: error\ndata: a\n\n", [{ ...message("a"), type: "error" }]],
  "the last type counts": ["event: a\nevent: b\ndata: c\n\n", [{ ...message("c"), type: "b" }]],
  "an empty type is none": ["event: a\nevent\ndata: b\n\n", [message("b")]],
  "a type is for one event": ["event: a\n\ndata: b\n\n", [message("b")]],
  "comments": [": ping\n\n:\n:data: no\ndata: a\n: more\n\n", [message("a")]],
  "one space is taken off": ["data:a\n\ndata:  b\n\ndata:\tc\n\n", ["a", " b", "\tc"].map((x) => message(x))],
  "colons in the value": ["data: a: b:\n\n", [message("a: b:")]],
  "unknown fields": ["Data: a\n data: b\ndata : c\ndat: d\nfoo\ndata: e\n\n", [message("e")]],
  "what has no empty line after it": ["data: a\n\ndata: b\n", [message("a")]],
  "a line that does not end": ["data: a\n\ndata: b", [message("a")]],
  "an id stays": ["id: 7\ndata: a\n\ndata: b\n\n", [message("a", "7"), message("b", "7")]],
  "an id is taken back": ["id: 7\ndata: a\n\nid\ndata: b\n\n", [message("a", "7"), message("b")]],
  "an id with a NUL": ["id: 7\nid: a\0b\ndata: a\n\n", [message("a", "7")]],
  "the id of an event without data": ["id: 7\n\ndata: a\n\n", [message("a", "7")]],
  "a byte order mark": ["\uFEFFdata: a\n\n", [message("a")]],
  "only the first is one": ["\uFEFF\uFEFFdata: a\n\ndata: \uFEFF\n\n", [message("\uFEFF")]],
  "characters of many bytes": ["data: äß€𝄞\n\n", [message("äß€𝄞")]],
  "other line ends are none": ["data: a\u2028b\u0085c\v\fd\n\n", [message("a\u2028b\u0085c\v\fd")]],
  "NUL is a character": ["data: a\0b\n\n", [message("a\0b")]],
};

for (const [rule, [text, events]] of Object.entries(RULES)) {
  test(`${rule}: in one piece`, () => assert.deepEqual(eventsOf(text), events));

  test(`${rule}: cut anywhere, and in bytes`, () => {
    const bytes = encode(text);
    for (let cut = 0; cut <= bytes.length; cut++) {
      const chunks = [bytes.subarray(0, cut), bytes.subarray(cut)];
      assert.deepEqual(eventsOf(...chunks), events, `cut at ${cut}`);
    }
    assert.deepEqual(eventsOf(...Array.from(bytes, (byte) => Uint8Array.of(byte))), events);
  });
}

test("bytes that are no UTF-8 become U+FFFD, and end no line", () => {
  const bytes = Uint8Array.of(...encode("data: a"), 0xff, 0xe2, 0x82, ...encode("b\n\n"));
  assert.deepEqual(eventsOf(bytes), [message("a\uFFFD\uFFFDb")]);
});

test("an event is there with its empty line, also where that may be half of a CRLF", () => {
  const parser = new EventStreamParser();
  assert.equal(parser.feed(encode("data: a\r\n\r")).length, 1);
  assert.equal(parser.feed(encode("\n")).length, 0);
  assert.equal(parser.feed(encode("")).length, 0);
  assert.equal(parser.feed(encode("\n")).length, 0);
  assert.deepEqual(parser.feed(encode("data: b\n\n")).map(plain), [message("b")]);
});

test("an empty chunk between CR and LF changes nothing", () => {
  assert.deepEqual(eventsOf("data: a\r", "", "\ndata: b\n\n"), [message("a\nb")]);
});

test("retry: digits only, and the last that are", () => {
  const parser = new EventStreamParser();
  assert.equal(parser.retry, null);
  const retries = ["10", "", "-1", "1.5", "1e3", "  20", "٣", "30x"].map((x) => `retry:${x}\n`);
  parser.feed(encode(retries.join("")));
  assert.equal(parser.retry, 10);
  parser.feed(encode("retry: 2500\n"));
  assert.equal(parser.retry, 2500);
});

test("the parser's last event ID is that of what has been dispatched, with data or without", () => {
  const parser = new EventStreamParser();
  parser.feed(encode("id: 1\ndata: a\n"));
  assert.equal(parser.lastEventId, "");
  parser.feed(encode("\nid: 2\n"));
  assert.equal(parser.lastEventId, "1");
  parser.feed(encode("\n"));
  assert.equal(parser.lastEventId, "2");
});

test("two parsers know nothing of each other", () => {
  const [one, other] = [new EventStreamParser(), new EventStreamParser()];
  one.feed(encode("id: 1\ndata: a\r"));
  assert.deepEqual(other.feed(encode("\ndata: b\n\n")).map(plain), [message("b")]);
});

test("JSON is parsed once; what is none is a SyntaxError", () => {
  const event = new StreamEvent("message", '{"a": [1]}', "");
  assert.deepEqual(event.json(), { a: [1] });
  assert.equal(event.json(), event.json());
  assert.equal(new StreamEvent("message", "null", "").json(), null);
  assert.throws(() => new StreamEvent("message", "[DONE]", "").json(), SyntaxError);
});

/** The standard's algorithm once more, on a whole text: the plain way. */
function reference(text) {
  const events = [];
  let [type, data, id] = ["", [], ""];
  const lines = text.replace(/^\uFEFF/, "").replace(/\r\n|\r/g, "\n").split("\n");
  for (const line of lines.slice(0, -1)) {
    const [, name, value = ""] = /^([^:]*)(?:: ?([^]*))?$/.exec(line);
    if (line === "") {
      if (data.length) events.push({ type: type || "message", data: data.join("\n"), lastEventId: id });
      [type, data] = ["", []];
    } else if (name === "data") data.push(value);
    else if (name === "event") type = value;
    else if (name === "id") id = value.includes("\0") ? id : value;
  }
  return events;
}

/** Numbers below `n` that are the same at each run (Park and Miller's generator). */
function dice(seed) {
  let state = seed;
  return (n) => (state = (state * 48271) % 2147483647) % n;
}

test("any text in any chunks gives the events of the whole text", () => {
  const roll = dice(20240607);
  const words = ["data", "data: ", "event: ", "id: ", "data: a", "\r", "\n", "\r\n", "\n\n", ":", " ", "\0", "é", "𝄞", "x", "\uFEFF"];
  let seen = 0;
  for (let round = 0; round < 3000; round++) {
    const text = Array.from({ length: roll(40) }, () => words[roll(words.length)]).join("");
    const bytes = encode(text);
    const chunks = [];
    for (let start = 0, end; start < bytes.length; start = end) {
      end = start + 1 + roll(8);
      chunks.push(bytes.subarray(start, end));
    }
    const expected = reference(text);
    assert.deepEqual(eventsOf(...chunks), expected, JSON.stringify(text));
    seen += expected.length;
  }
  assert.ok(seen > 1000, `only ${seen} events: the texts are too poor`);
});

test("the time for an event grows with its length, not with the square of it", () => {
  const parser = new EventStreamParser();
  parser.feed(encode("data: "));
  const chunk = encode("x".repeat(16));
  for (let count = 0; count < 65536; count++) parser.feed(chunk); // minutes, if each looked at all
  assert.equal(parser.feed(encode("\n\n"))[0].data.length, 65536 * 16);
});
