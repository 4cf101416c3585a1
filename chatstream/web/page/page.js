/** The page: asks, shows what comes, and stops. */

import { Access, TokenForm, asksForToken } from "./access.js";
import { TurnView, duration } from "./answer.js";
import { StreamError, stream } from "./chatstream.js";
import { Conversation, newName } from "./conversation.js";
import { inWords } from "./failures.js";

/** @typedef {import("./conversation.js").Turn} Turn */

const UNCONFIRMED = 1500; // ms that a stop may take before the next question goes out all the same
const SILENCE = 2000; // ms without a word after which an answer is given up, where one is offline
const LEAVING = 150; // ms in which a page that is being left learns of it
const NEAR = 48; // px from the bottom that count as there

const talk = document.getElementById("talk");
const turns = document.getElementById("turns");
const composer = document.getElementById("composer");
const message = document.getElementById("message");
const stopButton = document.getElementById("stop");
const latest = document.getElementById("latest");
const state = document.getElementById("state");
const forgetButton = document.getElementById("forget");

const access = new Access();
const tokenForm = new TokenForm(access);
let conversation = Conversation.restored();
/**
 * What is being answered, or about to be; `known` is whether a token went with the question.
 *
 * @type {{ turn: Turn, view: TurnView, known: boolean, answer?: any } | null}
 */
let current = null;
/** When something came last, as performance.now has it. */
let heard = 0;
/** Settled when the stops before are. */
let stopped = Promise.resolve();
/** Whether the view follows the answer: it does while its end is in sight. */
let following = true;
/** The provider's meter, where there is one. */
let meter = null;

/** Adds a question, and has it answered. What is being answered makes way. */
function ask(question) {
  stop(performance.now());
  const turn = conversation.add(question);
  show(turn);
  following = true;
  followAnswer();
  answerTo(turn);
}

/**
 * @param {Turn} turn One that is the last, and shown.
 * @param {boolean} [renewed] Whether it is asked again, with a new token against CSRF.
 */
async function answerTo(turn, renewed = false) {
  const mine = { turn, view: views.get(turn), known: access.given };
  begin(mine);
  // The session is one: with `reject` the service takes the next question when it is free again.
  await Promise.race([stopped, new Promise((resolve) => setTimeout(resolve, UNCONFIRMED))]);
  if (current !== mine) return;
  const streamId = newName();
  const fields = meter?.fields(streamId) ?? {};
  const messages = conversation.messagesFor(turn);
  const headers = access.headers();
  mine.answer = stream({ ...fields, messages, streamId, sessionId: conversation.sessionId, headers });
  meter?.follow(streamId, headers);
  try {
    for await (const delta of mine.answer.deltas()) {
      heard = performance.now();
      turn.text += delta.content;
      turn.reasoning += delta.reasoning;
      mine.view.changed();
    }
    if (current === mine) finish(mine);
  } catch (error) {
    // A browser that is about to leave the page may break the connection off before it says so.
    if (error.code === "network") await new Promise((resolve) => setTimeout(resolve, LEAVING));
    const again = !renewed && (await access.renewed(error));
    if (current !== mine) return;
    if (again) await answerTo(turn, true);
    else fail(mine, error);
  }
}

function begin(mine) {
  current = mine;
  Object.assign(mine.turn, { state: "answering", note: "" });
  mine.view.draw();
  conversation.save();
  document.body.dataset.state = "answering";
  state.textContent = "Answering.";
}

/** @param {number} when The stop was asked for, as performance.now has it. */
function stop(when) {
  if (!current) return;
  const { turn, answer } = current;
  stopped = Promise.all([stopped, answer?.stop()]);
  settle(current, "stopped", "Stopped");
  if (answer) meter?.ended(answer.streamId, when);
  state.textContent = turn.text ? "Stopped. What had come stays." : "Stopped.";
}

function finish(mine) {
  // Without a last word it was ended from elsewhere: a newer question in another tab, a cancel.
  const whole = mine.answer.outcome === "completed";
  settle(mine, whole ? "finished" : "stopped", whole ? "" : stoppedHere(mine) ? "Stopped" : "Stopped elsewhere");
  state.textContent = whole ? "The answer is complete." : `${mine.turn.note}.`;
  meter?.ended(mine.answer.streamId);
}

/** Whether this page stopped it without being asked to: it was being left, and came back. */
function stoppedHere({ answer }) {
  return answer.outcome === "stopped";
}

function fail(mine, error) {
  const sentence = inWords(error);
  settle(mine, "failed", sentence);
  offerAgain(mine, error.retryAfter);
  const pause = error.retryAfter ? ` Try again in ${duration(Math.ceil(error.retryAfter))}.` : "";
  state.textContent = sentence + pause;
  if (mine.answer) meter?.ended(mine.answer.streamId);
  if (asksForToken(error)) askForToken(mine);
}

/** Asks for the token that a question was refused for want of, and then asks that again. */
function askForToken({ turn, known }) {
  if (known) forgetToken();
  const given = () => {
    forgetButton.hidden = false;
    tryAgain(turn);
  };
  tokenForm.ask(known, given, () => (state.textContent = "Without a token there is no answer."));
}

function forgetToken() {
  access.forget();
  forgetButton.hidden = true;
}

/**
 * Gives up what nothing can come of. A browser that is offline may still reach a service on its own
 * machine, so while words come nothing is done; if none do, the connection would hang for minutes.
 */
function listenOffline() {
  if (!current || navigator.onLine) return;
  const left = heard + SILENCE - performance.now();
  if (left > 0) {
    setTimeout(listenOffline, left);
    return;
  }
  stopped = Promise.all([stopped, current.answer?.stop()]);
  fail(current, new StreamError("", { code: "network" }));
}

/** @param {number | null} seconds How long to wait; null for no need to. */
function offerAgain({ turn, view }, seconds) {
  view.fail(turn.note, seconds, () => tryAgain(turn), () => (state.textContent = "You can try again."));
}

function tryAgain(turn) {
  message.focus({ preventScroll: true }); // the button is about to go
  if (current || conversation.turns.at(-1) !== turn) return ask(turn.question);
  Object.assign(turn, { text: "", reasoning: "" });
  answerTo(turn);
}

/** Gives a turn its end. */
function settle({ turn, view }, outcome, note) {
  current = null;
  Object.assign(turn, { state: outcome, note });
  document.body.dataset.state = "idle";
  view.draw();
  conversation.save();
}

/** @type {WeakMap<Turn, TurnView>} */
const views = new WeakMap();

function show(turn) {
  const view = new TurnView(turn, followAnswer);
  views.set(turn, view);
  turns.append(view.element);
  if (turn.state === "failed") offerAgain({ turn, view }, null); // before a reload
  document.getElementById("welcome").hidden = true;
}

function beginAnew() {
  stop(performance.now());
  conversation.turns.forEach((turn) => views.get(turn).remove());
  conversation = new Conversation();
  conversation.save();
  document.getElementById("welcome").hidden = false;
  state.textContent = "A new chat.";
  message.focus();
}

function followAnswer() {
  if (following) talk.scrollTop = talk.scrollHeight;
  else latest.hidden = atEnd();
}

function atEnd() {
  return talk.scrollHeight - talk.scrollTop - talk.clientHeight < NEAR;
}

function send() {
  const question = message.value.trim();
  if (question === "") return;
  message.value = "";
  grow();
  ask(question);
}

/** Lets the box be as high as what is in it, up to what the style allows. */
function grow() {
  message.style.height = "auto";
  message.style.height = `${message.scrollHeight}px`;
}

talk.addEventListener("scroll", () => {
  following = atEnd();
  latest.hidden = following;
});
// A window that is turned, or a keyboard that comes up, leaves the end out of sight otherwise. This is
// before the `scroll` that the browser's own adjustment of it may bring.
new ResizeObserver(followAnswer).observe(talk);
latest.addEventListener("click", () => {
  following = true;
  latest.hidden = true;
  followAnswer();
  message.focus({ preventScroll: true });
});
composer.addEventListener("submit", (event) => {
  event.preventDefault();
  send();
});
message.addEventListener("input", grow);
message.addEventListener("keydown", (event) => {
  if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
  event.preventDefault();
  send();
});
document.addEventListener("keydown", (event) => {
  if (event.key !== "Escape" || event.isComposing || !current) return;
  event.preventDefault();
  stop(event.timeStamp);
});
stopButton.addEventListener("click", (event) => {
  stop(event.timeStamp);
  message.focus({ preventScroll: true }); // the button is about to go
});
document.getElementById("new").addEventListener("click", beginAnew);
forgetButton.addEventListener("click", () => {
  forgetToken();
  state.textContent = "The token is forgotten.";
  message.focus({ preventScroll: true }); // the button is gone
});
addEventListener("offline", () => {
  heard = performance.now();
  listenOffline();
});
// chatstream.js does that, too. Here it is so that nothing looks like a failure, and all is kept.
addEventListener("pagehide", (event) => stop(event.timeStamp));

forgetButton.hidden = !access.given;
conversation.turns.forEach(show);
followAnswer();
if (document.documentElement.dataset.meter === "on") {
  const { Meter } = await import("./meter.js");
  meter = new Meter();
}
message.focus();
