/**
 * What was asked and answered in this tab, and what of it the provider is told again.
 *
 * It is kept in the tab's sessionStorage: a reload stops the answer, and shows how far it came.
 */

const KEY = "chatstream:conversation";

/** A name that nobody else has: 128 random bits. Also where the page did not come over HTTPS. */
export function newName() {
  const bytes = crypto.getRandomValues(new Uint8Array(16));
  return Array.from(bytes, (byte) => byte.toString(16).padStart(2, "0")).join("");
}

/**
 * @typedef {object} Turn
 * @property {string} question
 * @property {string} text The answer, as it was seen.
 * @property {string} reasoning What the model thought before.
 * @property {"answering" | "finished" | "stopped" | "failed"} state
 * @property {string} note What its end is called, or what went wrong; "" if it needs no word.
 */

export class Conversation {
  /** The chat's name at the service: a new question in it supersedes the answer before. */
  sessionId = newName();
  /** @type {Turn[]} */
  turns = [];

  /** What this tab had before a reload; what was being answered then was stopped by it. */
  static restored() {
    const conversation = new Conversation();
    try {
      const { sessionId, turns } = JSON.parse(sessionStorage.getItem(KEY) ?? "{}");
      if (typeof sessionId === "string" && Array.isArray(turns)) {
        Object.assign(conversation, { sessionId, turns });
      }
    } catch {
      // No storage, or somebody else's words in it: then it begins anew.
    }
    for (const turn of conversation.turns) {
      if (turn.state === "answering") Object.assign(turn, { state: "stopped", note: "Stopped" });
    }
    return conversation;
  }

  /** Keeps all of it for this tab, if the browser lets us. */
  save() {
    try {
      sessionStorage.setItem(KEY, JSON.stringify({ sessionId: this.sessionId, turns: this.turns }));
    } catch {
      // It is full, or switched off.
    }
  }

  /**
   * @param {string} question
   * @returns {Turn}
   */
  add(question) {
    this.turns.push({ question, text: "", reasoning: "", state: "answering", note: "" });
    return this.turns.at(-1);
  }

  /**
   * What the provider has to know to answer a turn: all before it, a stopped answer as far as it was
   * seen. An answer of which nothing came is left out; providers refuse an empty message.
   *
   * @param {Turn} turn
   */
  messagesFor(turn) {
    const before = this.turns.slice(0, this.turns.indexOf(turn));
    const messages = before.flatMap(({ question, text }) => [
      { role: "user", content: question },
      ...(text === "" ? [] : [{ role: "assistant", content: text }]),
    ]);
    return [...messages, { role: "user", content: turn.question }];
  }
}
