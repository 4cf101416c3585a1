/** Errors in words: what happened, and whether and when to try again. */

import { asksForToken } from "./access.js";

/** @typedef {import("./chatstream.d.ts").StreamError} StreamError */

const WORDS = {
  upstream_connect: "The provider cannot be reached just now.",
  upstream_unreachable: "The provider hung up without an answer.",
  upstream_error: "The provider failed.",
  upstream_auth: "The provider refused the key of this service. Whoever runs it has to set another.",
  upstream_timeout: "The provider did not answer in time.",
  upstream_idle: "The provider fell silent for too long.",
  upstream_truncated: "The provider broke off.",
  upstream_not_stream: "The provider sent something that is no answer.",
  upstream_rate_limited: "The provider has too much to do, and asks for a pause.",
  event_too_large: "The provider sent more at once than this service takes.",
  busy: "This service is busy: every place is taken.",
  too_many_streams: "You have as many answers running as you may. Stop one of them, or wait for its end.",
  shutting_down: "This service is restarting.",
  unauthenticated: "You are not logged in. Log in, and try again.",
  model_not_allowed: "This service does not allow that model.",
  conflict: "This chat is being answered in another place. Stop it there, or begin a new chat.",
  unconfirmed: "The answer before could not be ended yet.",
  deadline: "The answer took longer than this service allows.",
  not_stream: "What came was a page, and no answer. Perhaps you have to log in again.",
  too_large: "The conversation has become too long for this service. Begin a new chat.",
};

/**
 * A sentence or two for whoever asked.
 *
 * @param {StreamError} error
 * @returns {string}
 */
export function inWords(error) {
  if (error.code === "network") {
    return navigator.onLine ? "This service cannot be reached." : "You are offline.";
  }
  if (asksForToken(error)) return "This service asks for a token.";
  if (Object.hasOwn(WORDS, error.code)) return WORDS[error.code];
  if (error.code === "upstream_rejected") return `The provider did not take it: ${error.message}`;
  if (error.code === "http") return `This service answered with an error (${error.status}).`;
  return error.message || "Something went wrong.";
}
