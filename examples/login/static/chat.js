// The page with the chat. What it sends has the CSRF token: the question, and the stop too.

import { stream, StreamError } from "/api/chat/chatstream.js";

const [turns, form, question, stop, failure] = ["turns", "ask", "question", "stop", "failure"].map(
  (id) => document.getElementById(id),
);
const token = document.querySelector("meta[name=csrf-token]").content;
const messages = [];
let sessionId; // the first answer has one made up
let answer;

form.addEventListener("submit", (event) => {
  event.preventDefault();
  void ask(question.value);
  question.value = "";
});
stop.addEventListener("click", () => answer?.stop());

async function ask(content) {
  failure.textContent = "";
  messages.push({ role: "user", content });
  show("question", content);
  const shown = show("answer", "");
  const asked = stream({ messages, sessionId, headers: { "X-CSRFToken": token } });
  answer = asked;
  sessionId = asked.sessionId;
  stop.hidden = false;
  try {
    for await (const { content } of asked.deltas()) shown.append(content);
  } catch (error) {
    if (!(error instanceof StreamError)) throw error;
    failure.textContent = error.message;
    if (error.code === "unauthenticated") location.assign("/login");
  } finally {
    shown.dataset.outcome = asked.outcome;
    // What was seen of it, also if it was stopped. Providers refuse an empty message.
    if (shown.textContent) messages.push({ role: "assistant", content: shown.textContent });
    if (answer === asked) stop.hidden = true;
  }
}

function show(kind, text) {
  const element = document.createElement("p");
  element.className = kind;
  element.textContent = text;
  turns.append(element);
  return element;
}
