/**
 * What goes with each request so that it is taken: the service's bearer token, the app's against CSRF.
 *
 * The first is asked for, and kept in the tab's sessionStorage; the second came with the page. Both
 * travel in headers, and nowhere else.
 */

/** @typedef {import("./chatstream.d.ts").StreamError} StreamError */

const KEY = "chatstream:token";
const TOKEN = /^[!-~]+$/; // what a header can carry
const CSRF = /<meta name="csrf-token" content="([^"&]+)">/;

export class Access {
  #token = kept();
  #csrf = document.querySelector('meta[name="csrf-token"]').content;

  /** Whether there is a token. */
  get given() {
    return this.#token !== "";
  }

  /** @returns {Record<string, string>} */
  headers() {
    return {
      ...(this.#token !== "" && { Authorization: `Bearer ${this.#token}` }),
      ...(this.#csrf !== "" && { "X-CSRFToken": this.#csrf }),
    };
  }

  /**
   * Keeps a token for this tab.
   *
   * @param {string} text
   * @returns {boolean} Whether it can be one.
   */
  take(text) {
    if (!TOKEN.test(text)) return false;
    this.#token = text;
    try {
      sessionStorage.setItem(KEY, text);
    } catch {
      // Switched off: then it is known until a reload.
    }
    return true;
  }

  forget() {
    this.#token = "";
    try {
      sessionStorage.removeItem(KEY);
    } catch {
      // Switched off, so there is nothing in it.
    }
  }

  /**
   * Asks for the page anew where what was refused may have had too old a token against CSRF.
   *
   * @param {StreamError} error
   * @returns {Promise<boolean>} Whether it makes sense to ask again.
   */
  async renewed(error) {
    const bySomebodyElse = error.code === "http" && (error.status === 400 || error.status === 403);
    if (this.#csrf === "" || !bySomebodyElse) return false;
    try {
      const page = await fetch(location.href);
      const [, token] = CSRF.exec(await page.text()) ?? [];
      if (token) this.#csrf = token;
      return token !== undefined;
    } catch {
      return false;
    }
  }
}

/**
 * Whether a refusal asks for a bearer token (RFC 9110, section 11.6.1).
 *
 * @param {StreamError} error
 */
export function asksForToken({ status, challenge }) {
  return status === 401 && /(^|,)\s*bearer\b/i.test(challenge ?? "");
}

/** The form that asks for the token. */
export class TokenForm {
  #dialog = document.getElementById("access");
  #input = document.getElementById("token");
  #wrong = document.getElementById("access-wrong");
  #given = () => {};
  #left = () => {};

  /** @param {Access} access Where it is kept. */
  constructor(access) {
    this.#dialog.querySelector("form").addEventListener("submit", (event) => {
      event.preventDefault();
      if (!access.take(this.#input.value.trim())) {
        this.#complain("A token has letters, digits and signs, and no spaces.");
        return;
      }
      this.#left = () => {};
      this.#dialog.close();
      this.#given();
    });
    document.getElementById("access-cancel").addEventListener("click", () => this.#dialog.close());
    this.#dialog.addEventListener("close", () => {
      this.#input.value = "";
      this.#left();
    });
  }

  /**
   * @param {boolean} wrong Whether there was one, and it was refused.
   * @param {() => void} given Called when another is kept.
   * @param {() => void} left Called when there will be none: Escape, Cancel.
   */
  ask(wrong, given, left) {
    this.#given = given;
    this.#left = left;
    this.#dialog.showModal();
    this.#complain(wrong ? "This token was not accepted." : ""); // now: what is hidden is not read out
    this.#input.focus();
  }

  #complain(sentence) {
    this.#wrong.textContent = sentence;
    this.#wrong.hidden = sentence === "";
    this.#input.ariaInvalid = String(sentence !== "");
    this.#input.select();
  }
}

/** This tab's token, from before a reload. */
function kept() {
  try {
    const token = sessionStorage.getItem(KEY) ?? "";
    return TOKEN.test(token) ? token : "";
  } catch {
    return "";
  }
}
