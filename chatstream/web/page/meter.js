/**
 * The built-in provider's figures beside the chat: what it generates, and when it was told to stop.
 *
 * The instant of a click is this page's; those of the provider are of the service's clock. Every
 * answer of the service tells its time, so the difference of the clocks is known to within half of
 * the quickest answer's way there and back.
 */

const EVERY = 250; // ms between two looks while an answer streams

const STORY = `# What Markdown looks like

A **bold** word, an *italic* one, \`code\` in a line, and a [link](https://example.com/).

1. First, a list
2. with numbers
   - and one inside it

\`\`\`python
def stop(stream):
    """Wakes whoever waits."""
    stream.shutdown()
\`\`\`

> What was said up to that point was paid for.

And then it goes on as any text does.

`;

/** How the provider may be asked to behave: the label, and its simulate. */
const BEHAVIOURS = [
  ["streams", { tokens: 400, rate: 25 }],
  ["is long in coming", { tokens: 400, rate: 25, headers_after: 15 }],
  ["thinks silently first", { tokens: 400, rate: 25, silent_after: 0, silent_for: 15 }],
  ["shows its reasoning", { tokens: 400, rate: 25, reasoning: 80 }],
  ["falls silent halfway", { tokens: 400, rate: 25, silent_after: 60, silent_for: 30 }],
  ["uses Markdown", { tokens: 300, rate: 25, text: STORY }],
  ["fails halfway", { tokens: 400, rate: 25, error_after: 60 }],
  ["is refused for 10 s", { status: 429, retry_after: 10 }],
];

export class Meter {
  #select = document.getElementById("behaviour");
  #cells = {
    generated: document.getElementById("meter-generated"),
    delivered: document.getElementById("meter-delivered"),
    connection: document.getElementById("meter-connection"),
    after: document.getElementById("meter-after"),
    time: document.getElementById("meter-time"),
  };
  #clock = { offset: 0, width: Infinity }; // ms: the service's less ours; of the quickest answer
  #followed = { streamId: "", headers: {}, over: true, timer: 0 }; // the answer that is shown

  constructor() {
    const options = BEHAVIOURS.map(([label, plan]) => new Option(label, JSON.stringify(plan)));
    this.#select.replaceChildren(...options);
    document.getElementById("meter").hidden = false;
  }

  /**
   * What a question has to carry so that the provider knows it by its name, and behaves.
   *
   * @param {string} streamId
   */
  fields(streamId) {
    return { simulate: { ...JSON.parse(this.#select.value), id: streamId } };
  }

  /**
   * Shows an answer's figures, from now until `ended` or the next.
   *
   * @param {string} streamId
   * @param {Record<string, string>} headers Who asks: those of the question.
   */
  follow(streamId, headers) {
    this.#leave();
    this.#followed = { streamId, headers, over: false, timer: 0 };
    for (const cell of Object.values(this.#cells)) cell.textContent = "–";
    this.#connection(undefined);
    void this.#look(this.#followed);
  }

  #leave() {
    this.#followed.over = true;
    clearTimeout(this.#followed.timer);
  }

  async #look(followed) {
    const figure = await this.#ask(followed, {});
    if (followed.over) return;
    if (figure) this.#show(figure);
    followed.timer = setTimeout(() => this.#look(followed), EVERY);
  }

  /**
   * Shows what became of an answer, and, if it was stopped, how soon.
   *
   * @param {string} streamId
   * @param {number} [stopped] When, as performance.now has it.
   */
  async ended(streamId, stopped) {
    const followed = this.#followed;
    if (streamId !== followed.streamId) return;
    this.#leave();
    const at = {};
    if (stopped !== undefined) {
      await this.#ask(followed, {}); // a stop may be sooner than any look at the clock
      at.at = (stopped + this.#clock.offset).toFixed(3);
    }
    const figure = await this.#ask(followed, { ...at, wait: "closed" });
    if (figure && followed === this.#followed) this.#show(figure);
  }

  /** The figures of an answer; null where they could not be had. */
  async #ask({ streamId, headers }, query) {
    const address = new URL(`meter/${encodeURIComponent(streamId)}`, import.meta.url);
    address.search = new URLSearchParams(query);
    const asked = performance.now();
    try {
      const response = await fetch(address, { headers });
      const told = performance.now();
      const figure = response.ok ? await response.json() : null;
      if (figure) this.#compare(figure.now_ms, asked, told, "wait" in query);
      return figure;
    } catch {
      return null; // a meter is no reason for an error
    }
  }

  #compare(now, asked, told, waited) {
    if (waited || told - asked > this.#clock.width) return;
    this.#clock = { offset: now - (asked + told) / 2, width: told - asked };
  }

  #show(figure) {
    if (!figure.known) return;
    this.#cells.generated.textContent = String(figure.generated);
    this.#cells.delivered.textContent = String(figure.delivered);
    this.#connection(figure.open);
    if (figure.stop_ms === undefined) return;
    const stopped = figure.stop_ms !== null; // else it had ended before
    this.#cells.after.textContent = stopped ? String(figure.generated_after) : "–";
    this.#cells.time.textContent = stopped ? milliseconds(figure.stop_ms) : "–";
  }

  #connection(open) {
    const cell = this.#cells.connection;
    cell.textContent = open === undefined ? "–" : open ? "open" : "closed";
    cell.dataset.open = String(open);
  }
}

function milliseconds(value) {
  return value < 1 ? "under 1 ms" : `${Math.round(value)} ms`;
}
