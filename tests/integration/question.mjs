// Asks with chatstream.js, says on standard output what happens, a line of JSON each, and does what
// standard input says: "stop", or "exit" for a process - a tab - that ends without a word.
//
//     node question.mjs '{"url": …, "messages": …}' [deaf]
//
// A deaf one reads on whatever happens, as a proxy may when its client has left.

import { createInterface } from "node:readline";

import { stream } from "../../chatstream/web/page/chatstream.js";

const [options, deaf] = process.argv.slice(2);
const tell = (fact) => console.log(JSON.stringify(fact));

async function deafFetch(url, { signal, ...init }) {
  const { body, headers } = await fetch(url, init);
  const reader = body.getReader();
  const pull = async (controller) => {
    const { done, value } = await reader.read();
    if (done) controller.close();
    else controller.enqueue(value);
  };
  return new Response(new ReadableStream({ pull }), { headers });
}

const answer = stream({ ...JSON.parse(options), ...(deaf && { fetch: deafFetch }) });
tell({ sessionId: answer.sessionId, streamId: answer.streamId });

const input = createInterface({ input: process.stdin });
input.on("line", async (line) => {
  if (line === "exit") process.exit(0);
  tell(await answer.stop());
});

try {
  for await (const event of answer) tell({ data: event.data });
  tell({ outcome: answer.outcome });
} catch ({ code, status, retryAfter }) {
  tell({ outcome: answer.outcome, code, status, retryAfter });
}
