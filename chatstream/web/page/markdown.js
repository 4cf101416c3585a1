/**
 * Markdown as DOM nodes, also while it is still being written.
 *
 * What a model says is text, and stays text. What has been drawn is not drawn again: of a long list
 * only its last item, of long code its last lines; and a frame draws no more than its share.
 */

import { Blocks, Leaf, Reader } from "./blocks.js";
import { element, inline } from "./inline.js";

/** An element that shows a text, and as it grows touches only what has changed. */
export class Rendering {
  #element;
  #make;
  #text = "";
  #reader;
  #view;

  /**
   * @param {Element} element Empty; its children are ours.
   * @param {"markdown" | "plain"} [language] Of the text. If plain, its white space counts.
   */
  constructor(element, language = "markdown") {
    this.#element = element;
    this.#make = () => (language === "plain" ? new Leaf("plain") : new Blocks("text"));
    this.#begin();
  }

  #begin() {
    this.#element.replaceChildren();
    this.#reader = new Reader(this.#make());
    this.#view = new View(this.#element);
  }

  /**
   * Shows more of a text, as much as a frame has time for.
   *
   * @param {string} text All of it.
   * @returns {boolean} Whether all of it is shown; if not, call again in the next frame.
   */
  update(text) {
    if (!text.startsWith(this.#text)) this.#begin();
    this.#text = text;
    const [block, done] = this.#reader.read(text);
    this.#view.show(block);
    return done;
  }
}

/** A block, or a piece of one, on the page. */
class View {
  #element;
  #inside; // the element that its parts are in
  #line; // the element that a piece is in which goes on with its last line
  #block = null;
  #parts = []; // their views

  constructor(element, inside = element, line = element) {
    this.#element = element;
    this.#inside = inside;
    this.#line = line;
  }

  /** Shows a block, or what has become of it: its last parts may have changed, and more be there. */
  show(block) {
    if (block === this.#block) return;
    this.#block = block;
    if (block.type === "piece") this.#fill(block);
    const views = this.#parts;
    while (views.length > 0 && views.at(-1).#block.id !== block.parts[views.length - 1]?.id) {
      this.#remove(views.pop());
    }
    for (let at = views.length - 1; at >= 0 && views[at].#block !== block.parts[at]; at -= 1) {
      views[at].show(block.parts[at]);
    }
    for (const part of block.parts.slice(views.length)) {
      views.push(this.#add(part));
      views.at(-1).show(part);
    }
  }

  #fill({ text, marked }) {
    this.#inside.replaceChildren();
    for (const node of marked ? inline(text) : [text]) this.#inside.append(node);
  }

  /** A further part's view, empty. */
  #add(part) {
    const first = this.#parts.length === 0;
    if (part.type === "piece") return first ? new View(this.#inside) : this.#addPiece(part);
    // An item of one paragraph, perhaps with a list below, needs no paragraph around its words.
    if (first && this.#block.type === "item" && part.type === "paragraph") return new View(this.#inside);
    const made = elementOf(part);
    if (this.#block.type === "text") made.dir ||= "auto"; // what is written from right to left is shown so
    this.#inside.append(made);
    return new View(made, part.type === "code" ? made.firstChild : made);
  }

  /** A further piece is a block of its own, so that the browser has less to lay out anew. */
  #addPiece({ text, marked, goesOn }) {
    const made = element("span");
    const broken = !goesOn || (marked && text.startsWith(" ")); // very long prose is broken at a space
    if (broken) made.style.display = "block";
    const line = broken ? made : this.#parts.at(-1).#line;
    (broken ? this.#inside : line).append(made);
    return new View(made, made, line);
  }

  #remove(view) {
    if (view.#element === this.#inside) this.#inside.replaceChildren(); // it was the only one
    else view.#element.remove();
  }
}

/** A block's element, with nothing in it. */
function elementOf(block) {
  if (block.type === "rule") return element("hr");
  if (block.type === "quote") return element("blockquote");
  if (block.type === "code") return code(block);
  if (block.type === "item") return element("li");
  if (block.type === "list") return list(block);
  if (block.type === "heading") return element(`h${Math.min(block.level + 2, 6)}`);
  return element("p");
}

function list({ start }) {
  const made = element(start === null ? "ul" : "ol");
  if (start !== null && start !== 1) made.setAttribute("start", String(start));
  return made;
}

function code({ language }) {
  const pre = element("pre", [element("code")]);
  pre.dir = "ltr";
  pre.tabIndex = 0; // it scrolls: also for the keyboard
  pre.setAttribute("role", "group");
  pre.setAttribute("aria-label", language ? `Code, ${language}` : "Code");
  if (language) pre.dataset.language = language;
  return pre;
}
