/** A turn on the page: the question, the answer as it comes, and how it ended. */

import { Rendering } from "./markdown.js";

/** @typedef {import("./conversation.js").Turn} Turn */

export class TurnView {
  /** @type {HTMLElement} */
  element = make("li", { className: "turn" });

  #turn;
  #shownThoughts;
  #shownText;
  #countdown = 0;
  #drawing = 0; // the animation frame that will
  #chosen = false; // somebody opened or closed the reasoning
  #answer = make("article", { className: "answer" });
  #reasoning = make("details", { className: "reasoning", hidden: true });
  #summary = make("summary");
  #thoughts = make("div", { className: "thoughts", dir: "auto" });
  #text = make("div", { className: "text" });
  #end = make("div", { className: "end" });
  #drawn = () => {};

  /**
   * @param {Turn} turn
   * @param {() => void} drawn Called when it has changed on the screen.
   */
  constructor(turn, drawn = () => {}) {
    this.#turn = turn;
    this.#drawn = drawn;
    this.#shownThoughts = new Rendering(this.#thoughts, "plain");
    this.#shownText = new Rendering(this.#text);
    this.#summary.addEventListener("click", () => (this.#chosen = true));
    this.#reasoning.append(this.#summary, this.#thoughts);
    this.#answer.append(unseen("Answer"), this.#reasoning, this.#text, this.#end);
    const question = make("article", { className: "question" });
    question.append(unseen("You"), make("p", { textContent: turn.question, dir: "auto" }));
    this.element.append(question, this.#answer);
    this.draw();
  }

  /** Has what is new in the turn drawn with the next frame. */
  changed() {
    this.#drawing ||= requestAnimationFrame(() => this.draw());
  }

  /** Draws the turn, now: how it stands, and its text. */
  draw() {
    this.#answer.dataset.state = this.#turn.state;
    this.#drawEnd();
    this.#drawText();
  }

  /** Draws what is new of the text. If that is much, as much as a frame has time for, and then the rest. */
  #drawText() {
    cancelAnimationFrame(this.#drawing);
    this.#drawing = 0;
    const { text, state } = this.#turn;
    const whole = this.#drawReasoning() && this.#shownText.update(text);
    this.#answer.ariaBusy = String(state === "answering" || !whole);
    this.#drawn();
    if (!whole) this.#drawing = requestAnimationFrame(() => this.#drawText());
  }

  /** @returns {boolean} Whether all of it is shown. */
  #drawReasoning() {
    const { reasoning, text, state } = this.#turn;
    const thinking = state === "answering" && text === "";
    this.#reasoning.hidden = reasoning === "";
    if (!this.#chosen) this.#reasoning.open = thinking;
    this.#summary.textContent = thinking ? "Thinking" : "What it thought";
    return this.#shownThoughts.update(reasoning);
  }

  #drawEnd() {
    const { text, reasoning, state, note } = this.#turn;
    const parts = [];
    if (state === "answering" && text === "" && reasoning === "") parts.push(waiting());
    if (note !== "") parts.push(make("p", { className: "mark", textContent: note }));
    this.#end.replaceChildren(...parts);
  }

  /**
   * Says what went wrong, below what had come, with a button to try again.
   *
   * @param {string} sentence
   * @param {number | null} seconds After which that makes sense; null for at once.
   * @param {() => void} again
   * @param {() => void} [due] Called when the time has come, if there was one to wait for.
   */
  fail(sentence, seconds, again, due = () => {}) {
    const button = make("button", { type: "button" });
    button.addEventListener("click", () => {
      if (button.ariaDisabled !== "true") again();
    });
    const box = make("div", { className: "failure" });
    box.append(make("p", { textContent: sentence }), button);
    this.#end.replaceChildren(box);
    this.#countDown(button, performance.now() + (seconds ?? 0) * 1000, due);
    this.#drawn();
  }

  /** A button that can be reached by the keyboard meanwhile, and says how long. */
  #countDown(button, until, due) {
    const tick = () => {
      const left = Math.ceil((until - performance.now()) / 1000);
      button.ariaDisabled = String(left > 0);
      button.textContent = left > 0 ? `Try again in ${duration(left)}` : "Try again";
      return left > 0;
    };
    if (!tick()) return;
    this.#countdown = setInterval(() => {
      if (tick()) return;
      clearInterval(this.#countdown);
      due();
    }, 250);
  }

  /** Takes it off the page. */
  remove() {
    clearInterval(this.#countdown);
    cancelAnimationFrame(this.#drawing);
    this.element.remove();
  }
}

/** @param {number} seconds Whole ones. */
export function duration(seconds) {
  const minutes = Math.floor(seconds / 60);
  return minutes === 0 ? `${seconds} s` : `${minutes} min ${seconds % 60} s`;
}

function waiting() {
  const dots = make("p", { className: "waiting" });
  dots.append(...Array.from({ length: 3 }, () => make("span")), unseen("Waiting for the first word", "span"));
  return dots;
}

/** Words for those who listen. */
function unseen(words, name = "h2") {
  return make(name, { className: "unseen", textContent: words });
}

function make(name, properties = {}) {
  return Object.assign(document.createElement(name), properties);
}
