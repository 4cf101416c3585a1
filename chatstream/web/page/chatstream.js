/**
 * Streams an LLM's answer from a chatstream service, and stops it at once.
 *
 *     const answer = stream({ messages: [{ role: "user", content: "Hello" }] });
 *     stopButton.onclick = () => answer.stop();
 *     for await (const { content } of answer.deltas()) output.append(content);
 *
 * An ES module without dependencies, for browsers and for Node 18 or newer. Its types are in
 * chatstream.d.ts.
 */

/** @typedef {import("./chatstream.js").Delta} Delta */
/** @typedef {import("./chatstream.js").Outcome} Outcome */
/** @typedef {import("./chatstream.js").StopResult} StopResult */
/** @typedef {import("./chatstream.js").StreamOptions} StreamOptions */

/**
 * Asks a question. The request is on its way when this returns.
 *
 * @param {StreamOptions} options `messages`; where and how to ask; any other field goes to the
 *     provider as it is.
 * @returns {Answer}
 * @throws {TypeError} What cannot become a request: a malformed `url`, `headers` or JSON. All that
 *     goes wrong later is thrown by the iteration.
 */
export function stream(options) {
  return new Answer(options);
}

/** A question that was not answered, or not to its end. Never thrown because of a stop. */
export class StreamError extends Error {
  /**
   * @param {string} message
   * @param {object} [facts]
   * @param {string} [facts.code] What went wrong, for programs.
   * @param {number | null} [facts.status] The response's HTTP status; null without a response.
   * @param {number | null} [facts.retryAfter] Seconds to wait before asking again; null if unsaid.
   * @param {string | null} [facts.challenge] The response's WWW-Authenticate; null without one.
   * @param {unknown} [facts.detail] The service's JSON, or the error event's.
   * @param {unknown} [facts.cause] What fetch threw.
   */
  constructor(message, { code = "http", status = null, retryAfter = null, challenge = null, detail, cause } = {}) {
    super(message, cause === undefined ? undefined : { cause });
    this.name = "StreamError";
    this.code = code;
    this.status = status;
    this.retryAfter = retryAfter;
    this.challenge = challenge;
    this.detail = detail;
  }
}

/** One event of an event stream. */
export class StreamEvent {
  /** @type {{ value: any } | undefined} */
  #parsed;

  /**
   * @param {string} type
   * @param {string} data
   * @param {string} lastEventId
   */
  constructor(type, data, lastEventId) {
    this.type = type;
    this.data = data;
    this.lastEventId = lastEventId;
  }

  /**
   * The data as JSON, parsed once: each call returns the same value.
   *
   * @throws {SyntaxError} It is none.
   */
  json() {
    this.#parsed ??= { value: JSON.parse(this.data) };
    return this.#parsed.value;
  }
}

const LINE_END = /\r\n?|\n/g;

/**
 * Bytes to events, to the letter of the WHATWG HTML standard, section 9.2.6 "Interpreting an event
 * stream" (https://html.spec.whatwg.org/multipage/server-sent-events.html). Pure: no I/O.
 */
export class EventStreamParser {
  /** The last event ID string: of the last event, also of one that had no data. */
  lastEventId = "";
  /** @type {number | null} The reconnection time in ms, where the stream named one. */
  retry = null;

  // The byte order mark is ours: Node 24's decoder takes two where the second has its own chunk.
  #decoder = new TextDecoder("utf-8", { ignoreBOM: true });
  #atStart = true; // where a byte order mark may be
  #line = ""; // the beginning of a line that has not ended yet
  #afterCr = false; // the last character was a CR: an LF that follows belongs to it
  #data = "";
  #type = "";
  #id = "";

  /**
   * The events that `chunk` completes, in order. An event is complete with the empty line after it:
   * what the stream's end leaves without one is dropped.
   *
   * @param {Uint8Array} chunk
   * @returns {StreamEvent[]}
   */
  feed(chunk) {
    let text = this.#decoder.decode(chunk, { stream: true });
    if (text === "") return []; // not even a whole character
    if (this.#atStart && text.startsWith("\uFEFF")) text = text.slice(1);
    this.#atStart = false;
    /** @type {StreamEvent[]} */
    const events = [];
    let start = this.#afterCr && text.startsWith("\n") ? 1 : 0;
    LINE_END.lastIndex = start;
    for (let end; (end = LINE_END.exec(text)); start = LINE_END.lastIndex) {
      const line = this.#line + text.slice(start, end.index);
      this.#line = "";
      const event = line === "" ? this.#dispatch() : this.#take(line);
      if (event) events.push(event);
    }
    this.#line += text.slice(start);
    this.#afterCr = text.endsWith("\r");
    return events;
  }

  /** @param {string} line */
  #take(line) {
    const colon = line.indexOf(":");
    const name = colon < 0 ? line : line.slice(0, colon); // "" for a comment
    const value = colon < 0 ? "" : line.slice(colon + (line[colon + 1] === " " ? 2 : 1));
    if (name === "data") this.#data += value + "\n";
    else if (name === "event") this.#type = value;
    else if (name === "id" && !value.includes("\0")) this.#id = value;
    else if (name === "retry" && /^[0-9]+$/.test(value)) this.retry = Number(value);
  }

  #dispatch() {
    this.lastEventId = this.#id;
    const [type, data] = [this.#type || "message", this.#data];
    this.#type = this.#data = "";
    return data === "" ? undefined : new StreamEvent(type, data.slice(0, -1), this.lastEventId);
  }
}

/** ms that a cancel is given to be answered before the connection of its answer is closed. */
const HEAD_START = 50;

/**
 * An answer that streams in: what `stream` returns. It has one verdict, its outcome, and the first
 * that is recorded stands: whatever is thrown after a stop is the stop's doing.
 */
class Answer {
  /** @type {Outcome | null} */
  #outcome = null;
  /** @type {Promise<StopResult> | undefined} */
  #stopping;
  /** @type {ReadableStreamDefaultReader<Uint8Array> | undefined} */
  #reader;
  #interrupt = () => {}; // ends what the iteration waits for
  #aborting = new AbortController(); // a stop's: of the request
  #settled = new AbortController(); // any end's: takes the listeners away
  #cancel;
  #response;
  #events;

  /** @param {StreamOptions} options */
  constructor(options) {
    const { sessionId, streamId, ask, cancel } = prepare(options);
    this.sessionId = sessionId;
    this.streamId = streamId;
    this.#cancel = cancel;
    this.#events = this.#read();
    if (options.signal?.aborted) this.#settle("stopped");
    else this.#listen(options);
    this.#response = this.stopped ? Promise.resolve(undefined) : this.#open(ask);
    this.#response.catch(() => {}); // the iteration throws it, if there is one
  }

  /** How it ended; null while it has not. */
  get outcome() {
    return this.#outcome;
  }

  /** Whether it was ended from this side. */
  get stopped() {
    return this.#outcome === "stopped";
  }

  /**
   * Ends the answer: at once for whoever iterates, and at the provider. Never rejects. Idempotent.
   *
   * @returns {Promise<StopResult>} What the service said of it. Nobody has to wait for that.
   */
  stop() {
    this.#stopping ??= this.#stop();
    return this.#stopping;
  }

  /** The events, less `[DONE]`. Throws a StreamError; ends quietly on a stop. */
  [Symbol.asyncIterator]() {
    return this.#iterator(this.#events);
  }

  /** What the events add to the text, where they do. Throws and ends as the events do. */
  deltas() {
    return this.#iterator(deltasOf(this.#events));
  }

  /** @returns {Promise<StopResult>} */
  async #stop() {
    // The verdict comes first: what fetch and the reader throw after an abort is then no failure.
    if (!this.#settle("stopped")) return { confirmed: this.#outcome !== "failed", reason: "ended" };
    this.#interrupt();
    // The cancel reaches the service through proxies that go on reading when their client has left,
    // and is remembered there if it overtakes the question. The abort needs no further request to
    // arrive, and frees a connection for the cancel: a browser has six to a host. It comes second:
    // the service answers a cancel for what has left with 404, which consoles show as an error.
    const confirmed = confirmation(this.#cancel());
    const timer = setTimeout(() => this.#abort(), HEAD_START);
    void confirmed.then(() => {
      clearTimeout(timer);
      this.#abort();
    });
    return confirmed;
  }

  /** Closes the connection. Idempotent. */
  #abort() {
    this.#aborting.abort();
    this.#response // for a `fetch` that knows no signals
      .then((response) => (this.#reader ?? response?.body)?.cancel())
      .catch(() => {});
  }

  /**
   * Records how it ended. The first verdict stands.
   *
   * @param {Outcome} outcome
   */
  #settle(outcome) {
    if (this.#outcome !== null) return false;
    this.#outcome = outcome;
    this.#settled.abort();
    return true;
  }

  /** @param {unknown} error */
  #fail(error) {
    this.#settle("failed");
    if (error instanceof StreamError) return error;
    return new StreamError("The connection failed.", { code: "network", cause: error });
  }

  /** @param {StreamOptions} options */
  #listen({ signal, stopOnLeave = true }) {
    const options = { signal: this.#settled.signal };
    signal?.addEventListener("abort", () => void this.stop(), options);
    const leave = () => {
      if (stopOnLeave) void this.stop();
      else if (this.#settle("stopped")) this.#interrupt(); // without a cancel: the service goes on
      this.#abort(); // no timer fires in a page that is gone
    };
    globalThis.addEventListener?.("pagehide", leave, options); // Node has none
  }

  /**
   * The response with the answer; undefined after a stop.
   *
   * @param {(signal: AbortSignal) => Promise<Response>} ask
   */
  async #open(ask) {
    try {
      const response = await ask(this.#aborting.signal);
      if (!isEventStream(response)) throw await refusal(response);
      return response;
    } catch (error) {
      if (!this.stopped) throw this.#fail(error);
    }
  }

  /**
   * What `promise` comes to, or undefined: after a stop nothing is waited for.
   *
   * @template Value
   * @param {Promise<Value>} promise
   * @returns {Promise<Value | undefined>}
   */
  #unlessStopped(promise) {
    return new Promise((resolve, reject) => {
      this.#interrupt = () => resolve(undefined);
      if (this.stopped) this.#interrupt();
      promise.then(resolve, reject);
    });
  }

  /** What the iterators share. Only what is asked for is read: the rest waits at the provider. */
  async *#read() {
    try {
      const body = (await this.#unlessStopped(this.#response))?.body;
      if (body) yield* this.#relay((this.#reader = body.getReader()));
      this.#settle("ended");
    } catch (error) {
      if (!this.stopped) throw this.#fail(error);
    }
  }

  /** @param {ReadableStreamDefaultReader<Uint8Array>} reader */
  async *#relay(reader) {
    const parser = new EventStreamParser();
    let finished = false; // the model has said why it ends
    for (let read; (read = await this.#unlessStopped(reader.read())) && !read.done; ) {
      for (const event of parser.feed(read.value)) {
        if (this.stopped) return;
        if (event.data.trim() === "[DONE]") {
          this.#settle("completed");
          return letEnd(reader);
        }
        const fault = faultOf(event);
        if (fault) {
          letEnd(reader);
          throw fault;
        }
        finished ||= isLast(event);
        yield event;
      }
    }
    if (finished) this.#settle("completed");
  }

  /**
   * One that stops the answer when it is left, also while its `next` is pending: a generator's own
   * `return` would wait for that.
   *
   * @template Item
   * @param {AsyncGenerator<Item, void, void>} items
   * @returns {AsyncIterableIterator<Item>}
   */
  #iterator(items) {
    return {
      next: () => items.next(),
      return: async () => {
        void this.stop();
        return { done: true, value: undefined };
      },
      [Symbol.asyncIterator]() {
        return this;
      },
    };
  }
}

/**
 * The two requests an answer can make. Bad options throw here, before anything has happened.
 *
 * @param {StreamOptions} options
 */
function prepare({ url, cancelUrl, headers, credentials, signal, stopOnLeave, fetch, ...fields }) {
  const sessionId = fields.sessionId ?? randomId();
  const streamId = fields.streamId ?? randomId();
  const streamAt = new URL(url ?? new URL("stream", import.meta.url), baseUrl());
  const cancelAt = new URL(cancelUrl ?? new URL("cancel", streamAt), baseUrl());
  cancelAt.pathname = `${cancelAt.pathname.replace(/\/$/, "")}/${encodeURIComponent(sessionId)}`;
  cancelAt.searchParams.set("streamId", streamId);

  const body = JSON.stringify({ ...fields, sessionId, streamId });
  const common = { method: "POST", credentials: credentials ?? "same-origin" };
  const own = new Headers(headers ?? undefined);
  const asking = new Headers(own);
  asking.set("Content-Type", "application/json");
  asking.set("Accept", "text/event-stream");
  const post = fetch ?? globalThis.fetch; // called as a function: a browser's is no method of ours
  return {
    sessionId,
    streamId,
    /** @param {AbortSignal} signal */
    ask: (signal) => post(streamAt.href, { ...common, headers: asking, body, signal }),
    // keepalive: it is sent to the end also when the page is gone meanwhile.
    cancel: async () => post(cancelAt.href, { ...common, headers: own, keepalive: true }),
  };
}

/** What fetch resolves addresses against; undefined in Node, where they have to be absolute. */
function baseUrl() {
  return globalThis.document?.baseURI ?? globalThis.location?.href;
}

/** 128 random bits: randomUUID is there in secure contexts only, and Node 18 has no crypto. */
function randomId() {
  const { crypto } = globalThis;
  if (crypto?.randomUUID) return crypto.randomUUID();
  const bytes = new Uint8Array(16);
  if (crypto) crypto.getRandomValues(bytes);
  else bytes.forEach((_, index) => (bytes[index] = Math.random() * 256));
  return Array.from(bytes, (byte) => byte.toString(16).padStart(2, "0")).join("");
}

/** @param {Response} response */
function isEventStream(response) {
  return response.ok && /^text\/event-stream\b/i.test(response.headers.get("Content-Type") ?? "");
}

/**
 * What a response says that is no answer.
 *
 * @param {Response} response
 */
async function refusal(response) {
  const { ok, status, headers } = response;
  const detail = await jsonOf(response);
  const said = ok ? `no event stream but ${headers.get("Content-Type") ?? "nameless"}` : status;
  return new StreamError(text(detail?.message) || `The service answered ${said}.`, {
    code: text(detail?.reason) || (ok ? "not_stream" : "http"),
    status,
    retryAfter: retryAfter(headers),
    challenge: headers.get("WWW-Authenticate"),
    detail,
  });
}

/**
 * Whether a stop is known to have had its effect.
 *
 * @param {Promise<Response>} cancel
 * @returns {Promise<StopResult>}
 */
async function confirmation(cancel) {
  try {
    const response = await cancel;
    const detail = await jsonOf(response);
    if (response.ok && detail?.cancelled === true) return { confirmed: true, reason: "cancelled" };
    const reason = text(detail?.reason) || "http";
    return { confirmed: reason === "not_found", reason }; // not_found: the abort came first
  } catch {
    return { confirmed: false, reason: "network" };
  }
}

/**
 * A response's JSON; undefined where it has none. A page that a proxy sends instead is not read.
 *
 * @param {Response} response
 * @returns {Promise<any>}
 */
async function jsonOf(response) {
  if (/\bjson\b/i.test(response.headers.get("Content-Type") ?? "")) {
    return response.json().catch(() => undefined);
  }
  response.body?.cancel().catch(() => {});
}

/**
 * Seconds until one may ask again: a number, or a date (RFC 9110, section 10.2.3), compared with the
 * clock that wrote it.
 *
 * @param {Headers} headers
 */
function retryAfter(headers) {
  const value = headers.get("Retry-After")?.trim() ?? "";
  if (/^\d+(\.\d+)?$/.test(value)) return Number(value);
  const until = /[a-z]{3}/i.test(value) ? httpDate(value) : NaN;
  const now = httpDate(headers.get("Date") ?? "") || Date.now();
  return Number.isNaN(until) ? null : Math.max(0, Math.ceil((until - now) / 1000));
}

/** @param {string} value In one of the three forms, of which the oldest does not name its zone. */
function httpDate(value) {
  return Date.parse(value.endsWith("GMT") ? value : `${value} GMT`);
}

/**
 * The error that an event is: the service's `event: error`, or a provider's `{"error": …}`.
 *
 * @param {StreamEvent} event
 */
function faultOf(event) {
  const named = event.type === "error";
  if (!named && !event.data.includes('"error"')) return undefined;
  const error = parsed(event)?.error;
  if (!named && !error) return undefined;
  const message = text(error?.message) || text(error) || "The provider reported an error.";
  const code = (named && text(error?.code)) || "upstream_error";
  return new StreamError(message, { code, status: 200, detail: error ?? event.data });
}

/** @param {StreamEvent} event */
function isLast(event) {
  if (!event.data.includes('"finish_reason"')) return false;
  return choicesOf(event).some((choice) => choice?.finish_reason);
}

/**
 * @param {AsyncGenerator<StreamEvent, void, void>} events
 * @returns {AsyncGenerator<Delta, void, void>}
 */
async function* deltasOf(events) {
  for await (const event of events) {
    const delta = choicesOf(event).find((choice) => choice && !choice.index)?.delta;
    const [content, reasoning] = [text(delta?.content), text(delta?.reasoning_content)];
    if (content || reasoning) yield { content, reasoning };
  }
}

/**
 * @param {StreamEvent} event
 * @returns {any[]}
 */
function choicesOf(event) {
  const choices = parsed(event)?.choices;
  return Array.isArray(choices) ? choices : [];
}

/** @param {StreamEvent} event */
function parsed(event) {
  try {
    return event.json();
  } catch {
    return undefined;
  }
}

/** @param {unknown} value */
function text(value) {
  return typeof value === "string" ? value : "";
}

/**
 * Has a body that has nothing more to say end by itself, so that its connection can be used again.
 *
 * @param {ReadableStreamDefaultReader<Uint8Array>} reader
 */
function letEnd(reader) {
  const end = reader.read().then(({ done }) => (done ? undefined : reader.cancel()));
  end.catch(() => {});
}
