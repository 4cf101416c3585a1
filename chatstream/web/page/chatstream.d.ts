/** Types of chatstream.js. What it does, and how to use it: docs/browser.md. */

/** Asks a question. The request is on its way when this returns; see `Answer`. */
export function stream(options: StreamOptions): Answer;

export interface StreamOptions {
  /** The chat so far, the question last. */
  messages: ReadonlyArray<{ role: string; [field: string]: unknown }>;
  /** The chat: a new question in it supersedes the one that streams. Made up when missing. */
  sessionId?: string;
  /** This one answer. Made up when missing. */
  streamId?: string;
  /** Where to ask. Default: `stream` beside the module's own address. */
  url?: string | URL;
  /** Where to cancel: `/<sessionId>?streamId=…` is added. Default: `cancel` beside `url`. */
  cancelUrl?: string | URL;
  /** Sent with the question and with the cancel: a CSRF token, say. */
  headers?: HeadersInit;
  /** fetch's. Default: "same-origin". */
  credentials?: RequestCredentials;
  /** Stops the answer when it is aborted. */
  signal?: AbortSignal | null;
  /**
   * Whether the page's end (a reload, a link, a closed tab) posts the cancel. Default: true. With
   * false the connection is closed and that is all: a service whose CHATSTREAM_ON_DISCONNECT is
   * "finish" then has the answer to its end.
   */
  stopOnLeave?: boolean;
  /** What to call instead of the global fetch. */
  fetch?: (url: string, init: RequestInit) => Promise<Response>;
  /** Anything else goes to the provider as it is: model, temperature, … */
  [field: string]: unknown;
}

/**
 * An answer that streams in. It is iterated once, event by event or by what they add to the text;
 * two loops share its events. Leaving a loop early stops it.
 */
export interface Answer extends AsyncIterable<StreamEvent> {
  readonly sessionId: string;
  readonly streamId: string;
  /** How it ended; null while it has not. */
  readonly outcome: Outcome | null;
  /** Whether it was ended from this side: by `stop`, a signal, leaving the loop, the page's end. */
  readonly stopped: boolean;
  /** The events, less `[DONE]`. Throws StreamError; ends quietly on a stop. */
  [Symbol.asyncIterator](): AsyncIterableIterator<StreamEvent>;
  /** The text instead of the events: what adds to neither content nor reasoning is left out. */
  deltas(): AsyncIterableIterator<Delta>;
  /**
   * Ends the answer: at once for whoever iterates, and at the provider. Never rejects. Idempotent:
   * there is one cancel, whose result all calls get. Nobody has to wait for it.
   */
  stop(): Promise<StopResult>;
}

/**
 * - completed: `[DONE]`, or the model said why it ends.
 * - stopped: from this side.
 * - ended: without either. Somebody else stopped it: a newer question in the session, a cancel.
 * - failed: the iteration throws a StreamError.
 */
export type Outcome = "completed" | "stopped" | "ended" | "failed";

export interface StopResult {
  /** The service says that nothing of it is live: the provider's connection is shut down. */
  confirmed: boolean;
  /**
   * - "cancelled": the cancel did it.
   * - "not_found": it was no longer live, since the service saw the connection close first; or was
   *   not live yet, and will not be.
   * - "ended": it was over before the stop, so nothing was sent.
   * - "network": nobody answered the cancel. "http": what did was no chatstream service.
   * - else the service's: "unconfirmed", "bus_unavailable", "unauthenticated", …
   */
  reason: string;
}

/** What an event adds to the text. One of the two is not empty. */
export interface Delta {
  content: string;
  /** What the model thinks before it answers. */
  reasoning: string;
}

/** A question that was not answered, or not to its end. Never thrown because of a stop. */
export class StreamError extends Error {
  constructor(message: string, facts?: StreamErrorFacts);
  name: string;
  /**
   * - the service's reasons ("busy", "upstream_rate_limited", …: README, "The wire"), also of its
   *   `event: error`
   * - "upstream_error": also a provider's own `{"error": …}` event
   * - "network": no response, or it broke off; `cause` is what fetch threw
   * - "http": a refusal that is not the service's. "not_stream": a 200 that is no event stream
   */
  code: string;
  /** The response's HTTP status; null for "network". */
  status: number | null;
  /** Seconds to wait before asking again; null if nobody said. */
  retryAfter: number | null;
  /** How to log in: the refusal's WWW-Authenticate; null where it has none. */
  challenge: string | null;
  /** The refusal's JSON, or the `error` of the event. */
  detail: unknown;
  cause?: unknown;
}

export interface StreamErrorFacts {
  code?: string;
  status?: number | null;
  retryAfter?: number | null;
  challenge?: string | null;
  detail?: unknown;
  cause?: unknown;
}

/** One event of an event stream. */
export class StreamEvent {
  constructor(type: string, data: string, lastEventId: string);
  /** "message", unless the stream names another. */
  type: string;
  data: string;
  lastEventId: string;
  /** The data as JSON: parsed once, the same value at each call. Throws SyntaxError. */
  json(): any;
}

/** Bytes to events, as the WHATWG HTML standard has it (9.2.6). No I/O: usable with any source. */
export class EventStreamParser {
  /** The last event ID, of the last event or after it of a bare `id`. */
  readonly lastEventId: string;
  /** The reconnection time in ms that the stream named last, or null. */
  readonly retry: number | null;
  /** The events that `chunk` completes. What the stream's end leaves incomplete is dropped. */
  feed(chunk: Uint8Array): StreamEvent[];
}
