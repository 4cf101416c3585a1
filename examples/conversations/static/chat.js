// The page. It sends a question and nothing of what was said before: the app knows that.

import { stream, StreamError } from "/api/chat/chatstream.js";

const [turns, form, question, stop, failure, list, anew] = [
  "turns", "ask", "question", "stop", "failure", "conversations", "new",
].map((id) => document.getElementById(id));
const finishes = document.body.dataset.finish === "yes";
const MARKS = { stopped: "Stopped", failed: "Broken off", lost: "Lost", answering: "Still answering" };

let conversation = location.hash.slice(1);
let end = () => {}; // stops what is being answered here

form.addEventListener("submit", (event) => {
  event.preventDefault();
  void ask(question.value).catch(tell);
  question.value = "";
});
stop.addEventListener("click", () => end());
anew.addEventListener("click", () => open(""));
addEventListener("hashchange", () => open(location.hash.slice(1)));
void load().catch(tell);

async function ask(content) {
  failure.textContent = "";
  if (!conversation) await begin();
  const shown = show({ question: content, answer: "", state: "" });
  const asked = stream({
    messages: [{ role: "user", content }],
    sessionId: conversation,
    stopOnLeave: !finishes,
  });
  end = () => asked.stop();
  stop.hidden = false;
  try {
    for await (const { content } of asked.deltas()) shown.append(content);
    mark(shown, asked.outcome === "completed" ? "completed" : "stopped");
  } catch (error) {
    mark(shown, "failed");
    if (conversation === asked.sessionId) tell(error);
  } finally {
    if (conversation === asked.sessionId) stop.hidden = true;
  }
}

async function begin() {
  const { id } = await json("/conversations", { method: "POST" });
  conversation = id;
  history.replaceState(null, "", `#${id}`);
  await showList();
}

function open(id) {
  if (id === conversation) return;
  if (!finishes) end();
  conversation = id;
  history.replaceState(null, "", id ? `#${id}` : location.pathname);
  void load().catch(tell);
}

/** Shows a conversation as the app has it; again and again while an answer goes on without us. */
async function load() {
  const shown = conversation;
  await showList();
  const said = shown ? (await json(`/conversations/${shown}`)).turns : [];
  if (shown !== conversation) return;
  turns.replaceChildren();
  said.forEach(show);
  const last = said.at(-1);
  const answering = last?.state === "answering";
  stop.hidden = !answering;
  if (!answering) return;
  end = () => json(`/api/chat/cancel/${shown}?streamId=${last.stream}`, { method: "POST" }).catch(tell);
  setTimeout(() => shown === conversation && stillAnswering() && load().catch(tell), 1000);
}

function stillAnswering() {
  return turns.lastElementChild?.dataset.state === "answering";
}

async function showList() {
  const { conversations } = await json("/conversations");
  list.replaceChildren(
    ...conversations.map(({ id, title }) => {
      const [item, link] = ["li", "a"].map((name) => document.createElement(name));
      link.href = `#${id}`;
      link.textContent = title ?? "New conversation";
      item.append(link);
      return item;
    }),
  );
}

function show({ question, answer, state }) {
  const [asked, shown] = ["question", "answer"].map((kind) => {
    const element = document.createElement("p");
    element.className = kind;
    return element;
  });
  asked.textContent = question;
  shown.textContent = answer;
  turns.append(asked, shown);
  if (state) mark(shown, state);
  return shown;
}

function mark(shown, state) {
  shown.dataset.state = state;
  shown.dataset.mark = MARKS[state] ?? "";
}

function tell(error) {
  if (!(error instanceof StreamError) && !(error instanceof Refusal)) throw error;
  failure.textContent = error.message;
}

class Refusal extends Error {}

async function json(url, options) {
  const response = await fetch(url, options);
  const body = await response.json();
  if (!response.ok) throw new Refusal(body.message ?? body.reason);
  return body;
}
