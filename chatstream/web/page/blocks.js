/**
 * Markdown's blocks, line by line as they are written: what has been read is not read again.
 *
 * A small language: paragraphs, headings, lists, quotes, rules, fenced code. Anything else is a
 * paragraph's. Pure.
 */

// A text can be long and odd, and each line of it is tried with each of these, so none may look at
// the same characters in more than one way. With `s`, also U+2028 is a character like any other.
const FENCE = /^( {0,3})(`{3,}|~{3,}(?!~))([^`]*)$/;
const HEADING = /^ {0,3}(#{1,6})\s+(.*)$/s;
const RULE = /^ {0,3}(?:(?:-\s*){3,}|(?:\*\s*){3,}|(?:_\s*){3,})$/;
const ITEM = /^( *)([-*+]|[0-9]{1,9}[.)])(?:( +)(.*))?$/s;
const QUOTE = /^ {0,3}> ?/;
export const DEEPEST = 6; // lists in lists, bold in italic: beyond that it is shown as it was written

// What is drawn anew while it grows is a piece, so that it costs the same in a long text.
const LONGEST = 8000; // characters of a line that are one piece; the rest of it is another
const MOST = 100; // lines of one piece
const AT_ONCE = 8000; // characters that are read before something else may happen
const LINE = 40; // what a line costs beside its characters

/**
 * Reads a text as it grows.
 *
 * The last line may go on, and be something else then. So it is tried with a copy of what it may
 * change, which is the open end: the last block, the last item in it, and so on.
 */
export class Reader {
  #whole;
  #at = 0; // what is before has been read
  #goesOn = false; // within a line

  /** @param {Block} whole What the text is: `new Blocks("text")`, or `new Leaf("plain")`. */
  constructor(whole) {
    this.#whole = whole;
  }

  /**
   * Reads on, but not too much at once.
   *
   * @param {string} text All of it: what was given before, and what has come since.
   * @returns {[block: Block, done: boolean]} What has been read, and whether that is all. Of two
   *     blocks, one given later, only what has changed is not the same object.
   */
  read(text) {
    for (let cost = 0; cost < AT_ONCE; ) {
      const piece = pieceAt(text, this.#at);
      if (!piece) return [this.#with(text.slice(this.#at)), true];
      this.#take(this.#whole, piece.text);
      [this.#at, this.#goesOn] = [piece.end, piece.goesOn];
      cost += piece.text.length + LINE;
    }
    return [fork(this.#whole), false];
  }

  #take(block, text) {
    if (this.#goesOn) block.continue(text);
    else block.line(text);
  }

  #with(rest) {
    const copy = fork(this.#whole);
    this.#take(copy, rest.endsWith("\r") ? rest.slice(0, -1) : rest);
    return copy;
  }
}

/** The line at a place, or what is one piece of it; null if the text ends before that does. */
function pieceAt(text, at) {
  const ahead = text.slice(at, at + LONGEST + 1);
  const found = /\r\n?|\n/.exec(ahead);
  if (found && found.index < LONGEST) {
    const end = at + found.index + found[0].length;
    if (found[0] === "\r" && end === text.length) return null; // \n may follow
    return { text: ahead.slice(0, found.index), end, goesOn: false };
  }
  if (ahead.length <= LONGEST) return null;
  const space = ahead.lastIndexOf(" ", LONGEST - 1);
  const length = space > LONGEST / 2 ? space : /[\uD800-\uDBFF]/.test(ahead[LONGEST - 1]) ? LONGEST - 1 : LONGEST;
  return { text: ahead.slice(0, length), end: at + length, goesOn: true };
}

/** A copy of a block whose open end may be changed. */
function fork(block) {
  const copy = Object.assign(Object.create(Object.getPrototypeOf(block)), block);
  copy.parts = [...block.parts];
  if (copy.parts.length > 0) copy.parts.push(fork(copy.parts.pop()));
  return copy;
}

/** Something with parts, of which only the last one changes. */
class Block {
  /** What tells it from others. Its copies have the same. */
  id = {};
  /** @type {Block[]} */
  parts = [];

  constructor(type) {
    this.type = type;
  }

  /** Takes a line, if it is this block's. @returns {boolean} */
  take() {
    return false;
  }
}

/** Some lines of a text, or some of a line. */
class Piece extends Block {
  lines = 1;

  /**
   * @param {string} text
   * @param {boolean} marked Whether a * in it may mean something.
   * @param {boolean} goesOn Whether it begins within a line.
   */
  constructor(text, marked, goesOn = false) {
    super("piece");
    Object.assign(this, { text, marked, goesOn });
  }

  get full() {
    return this.lines >= MOST || this.text.length >= LONGEST / 2;
  }
}

/** Lines of text, in pieces. What a mark opens in one, the next does not close. */
export class Leaf extends Block {
  constructor(type, marked = false) {
    super(type);
    this.marked = marked;
  }

  line(text) {
    const last = this.parts.at(-1);
    if (last) last.text += "\n";
    if (!last || last.full) this.parts.push(new Piece(text, this.marked));
    else [last.text, last.lines] = [last.text + text, last.lines + 1];
  }

  /** Takes more of its last line. */
  continue(text) {
    const last = this.parts.at(-1);
    if (!last || last.full) this.parts.push(new Piece(text, this.marked, true));
    else last.text += text;
  }
}

class Paragraph extends Leaf {
  constructor(line) {
    super("paragraph", true);
    this.line(line.trim());
  }

  take(line) {
    if (interrupts(line)) return false;
    this.line(line.trim());
    return true;
  }
}

class Heading extends Leaf {
  constructor([, marks, written]) {
    super("heading", true);
    this.level = marks.length;
    this.line(headingText(written));
  }
}

/** Code, up to the closing fence or, while there is none, to the end. */
class Code extends Leaf {
  constructor([, indent, fence, info]) {
    super("code");
    this.language = info.trim().split(/\s/)[0];
    this.closing = new RegExp(`^ {0,3}\\${fence[0]}{${fence.length},}\\s*$`);
    this.own = new RegExp(`^ {0,${indent.length}}`);
    this.closed = false;
  }

  take(line) {
    if (this.closed) return false;
    if (this.closing.test(line)) this.closed = true;
    else this.line(line.replace(this.own, ""));
    return true;
  }
}

/** What has blocks in it: a text, a quote, an item. */
export class Blocks extends Block {
  open = false; // the last of its blocks may take more

  constructor(type, depth = 0) {
    super(type);
    this.depth = depth;
  }

  line(text) {
    if (this.open && this.parts.at(-1).take(text)) return;
    this.open = text.trim() !== "";
    if (this.open) this.parts.push(begun(text, this.depth));
  }

  continue(text) {
    if (this.open && this.parts.at(-1).continue) this.parts.at(-1).continue(text);
    else this.line(text);
  }
}

class Quote extends Blocks {
  constructor(line, depth) {
    super("quote", depth + 1);
    this.take(line);
  }

  take(line) {
    if (!QUOTE.test(line)) return false;
    this.line(line.replace(QUOTE, ""));
    return true;
  }
}

/** A list: items of one kind, and what is indented below them. */
class List extends Block {
  constructor(item, depth) {
    super("list");
    const [, indent, marker] = item;
    Object.assign(this, { depth, indent: indent.length, kind: marker.at(-1), parts: [new Item(item, depth)] });
    /** Its first number; null without numbers. */
    this.start = /[0-9]/.test(marker) ? Number.parseInt(marker, 10) : null;
  }

  take(line) {
    if (this.parts.at(-1).take(line)) return true;
    const item = itemOf(line);
    const ours = item && item[1].length <= this.indent + 1 && item[2].at(-1) === this.kind;
    if (!ours || isRule(line)) return false;
    this.parts.push(new Item(item, this.depth));
    return true;
  }

  continue(text) {
    this.parts.at(-1).continue(text);
  }
}

class Item extends Blocks {
  blank = ""; // lines that are its own if another follows

  constructor([, indent, marker, gap, text], depth) {
    super("item", depth + 1);
    const inset = indent.length + marker.length + Math.min((gap ?? " ").length, 4);
    this.least = Math.min(inset, indent.length + 2);
    this.own = new RegExp(`^ {0,${inset}}`);
    this.line(text ?? "");
  }

  /** Takes a line that is indented, or goes on with the one before. */
  take(line) {
    if (line.trim() === "") {
      this.blank += `${line}\n`;
      return true;
    }
    const indented = spaced(line).search(/\S/) >= this.least;
    if (!indented && (this.blank !== "" || interrupts(line) || ITEM.test(line))) return false;
    for (const own of [...this.blank.split("\n").slice(0, -1), line]) this.line(spaced(own).replace(this.own, ""));
    this.blank = "";
    return true;
  }
}

/** The block that a line begins. */
function begun(line, depth) {
  const heading = HEADING.exec(line);
  if (heading) return new Heading(heading);
  const fence = fenceOf(line);
  if (fence) return new Code(fence);
  if (isRule(line)) return new Block("rule");
  if (depth < DEEPEST && QUOTE.test(line)) return new Quote(line, depth);
  const item = depth < DEEPEST && itemOf(line);
  return item ? new List(item, depth) : new Paragraph(line);
}

/** Whether a line ends the paragraph before it. A number does only as 1: years begin lines, too. */
function interrupts(line) {
  if (line.trim() === "" || HEADING.test(line) || fenceOf(line)) return true;
  if (isRule(line) || QUOTE.test(line)) return true;
  const item = itemOf(line);
  return item !== null && Boolean(item[4]) && !/^(?!1[.)])[0-9]/.test(item[2]);
}

// How a line ends makes it a fence, or a rule. Of a long one, that may not be known yet.
const PLAIN = LONGEST / 2;

function fenceOf(line) {
  return line.length < PLAIN ? FENCE.exec(line) : null;
}

function isRule(line) {
  return line.length < PLAIN && RULE.test(line);
}

function itemOf(line) {
  return ITEM.exec(spaced(line));
}

/** A line with its indentation in spaces. */
function spaced(line) {
  return line.replace(/^[ \t]+/, (indent) => indent.replaceAll("\t", "    "));
}

/** A heading's words, without the #s that may close it. */
function headingText(written) {
  const text = written.trim();
  const words = withoutEnd(text, "#");
  return /\s/.test(words.at(-1) ?? "") ? words.trimEnd() : text;
}

/** A text without its last characters that are all of some kind. */
export function withoutEnd(text, kind) {
  let end = text.length;
  while (end > 0 && kind.includes(text[end - 1])) end -= 1;
  return text.slice(0, end);
}
