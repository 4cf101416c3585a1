/** What the types promise: compiled, never run. Each line that must not compile says so. */

import {
  EventStreamParser,
  StreamError,
  StreamEvent,
  stream,
  type Answer,
  type Delta,
  type Outcome,
  type StopResult,
} from "../../../chatstream/web/page/chatstream.js";
import * as declared from "../../../chatstream/web/page/chatstream.js";
// A copy of the module under a name for which there are no declarations: its types are its own.
import * as written from "../../../chatstream/web/page/written.js";

/** The declarations say of the module what its code says. */
const declarations: typeof declared = written;
const code: keyof typeof declared = "" as keyof typeof written;

const messages = [{ role: "user", content: "Hello" }];

async function use(signal: AbortSignal): Promise<string> {
  const answer: Answer = stream({
    messages,
    sessionId: "chat",
    streamId: "answer",
    url: new URL("https://example.com/api/chat/stream"),
    cancelUrl: "/api/chat/cancel",
    headers: { "X-CSRFToken": "token" },
    credentials: "include",
    signal,
    stopOnLeave: false,
    fetch: (url, init) => fetch(url, { ...init, cache: "no-store" }),
    model: "deepseek-reasoner",
    temperature: 0.5,
  });
  const named: string = answer.sessionId + answer.streamId;
  let text = "";
  try {
    for await (const event of answer) text += event.type + event.data + event.lastEventId;
    for await (const { content, reasoning } of answer.deltas()) text += reasoning + content;
  } catch (error) {
    if (!(error instanceof StreamError)) throw error;
    const wait: number = error.retryAfter ?? 0;
    const login: string = error.challenge ?? "";
    const status: number | null = error.status;
    text += `${error.name} ${error.code} ${error.message} ${status} ${wait} ${login}`;
  }
  const { confirmed, reason }: StopResult = await answer.stop();
  const outcome: Outcome | null = answer.outcome;
  const stopped: boolean = answer.stopped;
  return [named, text, confirmed, reason, outcome, stopped].join();
}

const parser = new EventStreamParser();
const events: StreamEvent[] = parser.feed(new Uint8Array());
const facts: [string, number | null, string] = [parser.lastEventId, parser.retry, events[0].json().id];
const delta: Delta = { content: "", reasoning: "" };

// @ts-expect-error: messages are required
stream({});
// @ts-expect-error: a message has a role
stream({ messages: [{ content: "Hello" }] });
// @ts-expect-error: a name is a string
stream({ messages, streamId: 7 });
// @ts-expect-error: how it ends is for the module to say
stream({ messages }).outcome = "completed";
// @ts-expect-error: there is no such ending
const aborted: Outcome = "aborted";
// @ts-expect-error: bytes, not text: a character may be cut in two
parser.feed("data: 1\n\n");

export { aborted, code, declarations, delta, facts, use };
