/**
 * Markdown as DOM nodes, also while it is still being written.
 *
 * What a model says is text, and stays text: nothing here parses HTML, and a link leads to http or
 * https or is none. A small language: paragraphs, headings, lists, quotes, rules, fenced code;
 * within them bold, italic, struck out, code and links. Anything else is shown as it was written.
 */

// A text can be long and odd, and each line of it is tried with each of these, so none may look at
// the same characters in more than one way. With `s`, also U+2028 is a character like any other.
const FENCE = /^( {0,3})(`{3,}|~{3,}(?!~))([^`]*)$/;
const HEADING = /^ {0,3}(#{1,6})\s+(.*)$/s;
const RULE = /^ {0,3}(?:(?:-\s*){3,}|(?:\*\s*){3,}|(?:_\s*){3,})$/;
const ITEM = /^( *)([-*+]|[0-9]{1,9}[.)])(?:( +)(.*))?$/s;
const QUOTE = /^ {0,3}> ?/;
const DEEPEST = 6; // lists in lists, bold in italic: beyond that it is shown as it was written

/**
 * The blocks of a text. Pure. Each has its `source`, so that an unchanged one can be told.
 *
 * @param {string} text
 * @returns {Block[]}
 *
 * @typedef {object} Block
 * @property {"paragraph" | "heading" | "code" | "list" | "quote" | "rule"} type
 * @property {string} source
 * @property {string} [text] Of a paragraph, a heading, code.
 * @property {number} [level] Of a heading: 1 to 6.
 * @property {string} [language] Of code, as the fence names it.
 * @property {number | null} [start] Of a list: its first number; null without numbers.
 * @property {Block[][]} [items] Of a list.
 * @property {Block[]} [blocks] Of a quote.
 */
export function parse(text, depth = 0) {
  const lines = text.replace(/\r\n?/g, "\n").split("\n");
  const blocks = [];
  for (let at = 0; at < lines.length; ) {
    if (lines[at].trim() === "") {
      at += 1;
      continue;
    }
    const [block, end] = blockAt(lines, at, depth);
    blocks.push({ ...block, source: lines.slice(at, end).join("\n") });
    at = end;
  }
  return blocks;
}

/** A line with its indentation in spaces. */
function spaced(line) {
  return line.replace(/^[ \t]+/, (indent) => indent.replaceAll("\t", "    "));
}

function itemOf(line) {
  return ITEM.exec(spaced(line));
}

/** The block that begins at a line, and the line after it. */
function blockAt(lines, at, depth) {
  const line = lines[at];
  const heading = HEADING.exec(line);
  if (heading) return [{ type: "heading", level: heading[1].length, text: headingText(heading[2]) }, at + 1];
  if (FENCE.test(line)) return fenceAt(lines, at);
  if (RULE.test(line)) return [{ type: "rule" }, at + 1];
  if (depth < DEEPEST && QUOTE.test(line)) return quoteAt(lines, at, depth);
  if (depth < DEEPEST && itemOf(line)) return listAt(lines, at, depth);
  let end = at + 1;
  while (end < lines.length && !interrupts(lines[end])) end += 1;
  return [{ type: "paragraph", text: lines.slice(at, end).map((one) => one.trim()).join("\n") }, end];
}

/** A heading's words, without the #s that may close it. */
function headingText(written) {
  const text = written.trim();
  const end = withoutEnd(text, "#");
  return end > 0 && /\s/.test(text[end - 1]) ? text.slice(0, end).trimEnd() : text;
}

/** Where a text's last characters begin that are all of some kind. */
function withoutEnd(text, kind) {
  let end = text.length;
  while (end > 0 && kind.includes(text[end - 1])) end -= 1;
  return end;
}

/** Whether a line ends the paragraph before it. A number does only as 1: years begin lines, too. */
function interrupts(line) {
  if (line.trim() === "" || HEADING.test(line) || FENCE.test(line)) return true;
  if (RULE.test(line) || QUOTE.test(line)) return true;
  const item = itemOf(line);
  return item !== null && Boolean(item[4]) && !/^(?!1[.)])[0-9]/.test(item[2]);
}

/** Code, up to the closing fence or, while there is none, to the end. */
function fenceAt(lines, at) {
  const [, indent, fence, info] = FENCE.exec(lines[at]);
  const closing = new RegExp(`^ {0,3}\\${fence[0]}{${fence.length},}\\s*$`);
  let end = at + 1;
  while (end < lines.length && !closing.test(lines[end])) end += 1;
  const own = new RegExp(`^ {0,${indent.length}}`);
  const code = lines.slice(at + 1, end).map((line) => line.replace(own, ""));
  const block = { type: "code", language: info.trim().split(/\s/)[0], text: code.join("\n") };
  return [block, Math.min(end + 1, lines.length)];
}

function quoteAt(lines, at, depth) {
  let end = at;
  while (end < lines.length && QUOTE.test(lines[end])) end += 1;
  const inside = lines.slice(at, end).map((line) => line.replace(QUOTE, "")).join("\n");
  return [{ type: "quote", blocks: parse(inside, depth + 1) }, end];
}

/** A list: items of one kind, and what is indented below them. */
function listAt(lines, at, depth) {
  const [, indent, marker] = itemOf(lines[at]);
  const kind = marker.at(-1);
  const items = [];
  let end = at;
  for (let next = at; next < lines.length; ) {
    const item = itemOf(lines[next]);
    const ours = item && item[1].length <= indent.length + 1 && item[2].at(-1) === kind;
    if (!ours || RULE.test(lines[next])) break;
    end = itemEnd(lines, next, item);
    items.push(parse(itemText(lines, next, end, item), depth + 1));
    next = end;
    while (next < lines.length && lines[next].trim() === "") next += 1;
  }
  const start = /[0-9]/.test(marker) ? Number.parseInt(marker, 10) : null;
  return [{ type: "list", start, items }, end];
}

/** How far the lines of an item are indented. */
function inset(item) {
  return item[1].length + item[2].length + Math.min((item[3] ?? " ").length, 4);
}

/** The line after an item's last: what follows is its own if it is indented, or goes on with it. */
function itemEnd(lines, at, item) {
  let end = at + 1;
  for (let next = at + 1; next < lines.length; next += 1) {
    if (lines[next].trim() === "") continue;
    const indented = spaced(lines[next]).search(/\S/) >= Math.min(inset(item), item[1].length + 2);
    if (!indented && (next > end || interrupts(lines[next]) || ITEM.test(lines[next]))) break;
    end = next + 1;
  }
  return end;
}

function itemText(lines, at, end, item) {
  const own = new RegExp(`^ {0,${inset(item)}}`);
  const rest = lines.slice(at + 1, end).map((line) => spaced(line).replace(own, ""));
  return [item[4] ?? "", ...rest].join("\n");
}

/** An element that shows a text, and as it grows touches only what has changed. */
export class Rendering {
  #element;
  #sources = [];

  /** @param {Element} element Empty; its children are ours. */
  constructor(element) {
    this.#element = element;
  }

  /** @param {string} text All of it. */
  update(text) {
    const blocks = parse(text);
    let same = 0;
    while (same < blocks.length && blocks[same].source === this.#sources[same]) same += 1;
    while (this.#element.childNodes.length > same) this.#element.lastChild.remove();
    for (const block of blocks.slice(same)) {
      const added = build(block);
      added.dir ||= "auto"; // what is written from right to left is shown so
      this.#element.append(added);
    }
    this.#sources = blocks.map((block) => block.source);
  }
}

/** A block as an element. */
function build(block) {
  if (block.type === "rule") return element("hr");
  if (block.type === "quote") return element("blockquote", block.blocks.map(build));
  if (block.type === "code") return code(block);
  if (block.type === "list") return list(block);
  if (block.type === "heading") return element(`h${Math.min(block.level + 2, 6)}`, inline(block.text));
  return element("p", inline(block.text));
}

function list(block) {
  const items = block.items.map((blocks) => {
    // An item of one paragraph, perhaps with a list below, needs no paragraph around its words.
    const [first, ...rest] = blocks;
    const words = first?.type === "paragraph" ? inline(first.text) : first ? [build(first)] : [];
    return element("li", [...words, ...rest.map(build)]);
  });
  const made = element(block.start === null ? "ul" : "ol", items);
  if (block.start !== null && block.start !== 1) made.setAttribute("start", String(block.start));
  return made;
}

function code({ text, language }) {
  const pre = element("pre", [element("code", [text])]);
  pre.dir = "ltr";
  pre.tabIndex = 0; // it scrolls: also for the keyboard
  pre.setAttribute("role", "group");
  pre.setAttribute("aria-label", language ? `Code, ${language}` : "Code");
  if (language) pre.dataset.language = language;
  return pre;
}

function element(name, children = []) {
  const made = document.createElement(name);
  for (const child of children) made.append(child); // one call for all of them has its bounds
  return made;
}

const MARKS = [
  ["**", "strong"],
  ["__", "strong"],
  ["~~", "del"],
  ["*", "em"],
  ["_", "em"],
];
const SPECIAL = /[\\`*_~[!<\n]|https?:\/\//g;

/** A text's nodes: strings and elements. */
function inline(text, depth = 0, links = true) {
  const nodes = [];
  const hopeless = new Set(); // marks that nothing closes from here on
  let plain = "";
  for (let at = 0; at < text.length; ) {
    const found = special(text, at, depth, links, hopeless);
    if (found) {
      nodes.push(plain, ...found.nodes);
      plain = "";
      at = found.end;
    } else {
      // The next place where something could begin; a search from `at` alone would be quadratic.
      SPECIAL.lastIndex = at + 1;
      const next = SPECIAL.exec(text)?.index ?? text.length;
      plain += text.slice(at, next);
      at = next;
    }
  }
  return [...nodes, plain].filter((node) => node !== "");
}

/** What begins at a place of a text, if it is more than its characters. */
function special(text, at, depth, links, hopeless) {
  const character = text[at];
  if (character === "\n") return { nodes: [element("br")], end: at + 1 };
  if (character === "\\" && /[!-/:-@[-`{-~]/.test(text[at + 1] ?? "")) {
    return { nodes: [text[at + 1]], end: at + 2 };
  }
  if (character === "`") return codeSpan(text, at, hopeless);
  if (links && "[!<h".includes(character)) return linkAt(text, at, depth);
  return depth < DEEPEST ? emphasis(text, at, depth, links, hopeless) : null;
}

function codeSpan(text, at, hopeless) {
  const [ticks] = /^`+/.exec(text.slice(at, at + 100));
  const end = hopeless.has(ticks) ? -1 : closingTicks(text, at + ticks.length, ticks);
  if (end < 0) {
    hopeless.add(ticks);
    return { nodes: [ticks], end: at + ticks.length };
  }
  const inside = text.slice(at + ticks.length, end).replace(/\n/g, " ");
  const padded = inside.startsWith(" ") && inside.endsWith(" ") && /[^ ]/.test(inside);
  return { nodes: [element("code", [padded ? inside.slice(1, -1) : inside])], end: end + ticks.length };
}

/** Where a run of exactly as many backticks begins. */
function closingTicks(text, from, ticks) {
  for (let at = text.indexOf(ticks, from); at >= 0; ) {
    let end = at + ticks.length;
    while (text[end] === "`") end += 1;
    if (end === at + ticks.length) return at;
    at = text.indexOf(ticks, end);
  }
  return -1;
}

function emphasis(text, at, depth, links, hopeless) {
  for (const [mark, name] of MARKS) {
    if (!text.startsWith(mark, at) || hopeless.has(mark) || !opens(text, at, mark)) continue;
    const end = closing(text, at + mark.length, mark);
    if (end < 0) {
      hopeless.add(mark);
      continue;
    }
    const inside = inline(text.slice(at + mark.length, end), depth + 1, links);
    return { nodes: [element(name, inside)], end: end + mark.length };
  }
  return null;
}

/** Whether a mark can begin something: a word follows, and for _ none goes before. */
function opens(text, at, mark) {
  const [before, after] = [text[at - 1] ?? " ", text[at + mark.length] ?? " "];
  if (mark.length === 1 && (before === mark || after === mark)) return false; // of a longer run
  return /\S/.test(after) && !(mark[0] === "_" && /[\p{L}\p{N}]/u.test(before));
}

/** Where the mark that closes is; -1 where there is none. */
function closing(text, from, mark) {
  for (let at = text.indexOf(mark, from); at >= 0; at = text.indexOf(mark, at + 1)) {
    while (mark.length === 2 && text[at + 2] === mark[0]) at += 1; // ***: the inner one closes first
    const [before, after] = [text[at - 1], text[at + mark.length] ?? " "];
    const whole = mark.length === 2 || (before !== mark && after !== mark);
    const word = mark[0] === "_" && /[\p{L}\p{N}]/u.test(after);
    if (at > from && whole && !word && /\S/.test(before) && before !== "\\") return at;
    if (!whole) while (text[at + 1] === mark) at += 1; // a longer run is another mark
  }
  return -1;
}

const LABELLED = /!?\[((?:\\.|[^\\[\]]|\[[^[\]]{0,200}\]){0,1000})\]\(\s*<?([^\s<>]{1,2000}?)>?(?:\s+["'(][^\n]{0,200}?["')])?\s*\)/y;
const BARE = /<?(https?:\/\/[^\s<>"`]{1,2000})>?/y;

/** A link, if it leads where a link may. */
function linkAt(text, at, depth) {
  if (text[at] === "<" || text[at] === "h") return bareLink(text, at);
  LABELLED.lastIndex = at;
  const found = LABELLED.exec(text);
  const href = found && address(found[2]);
  if (!href) return null;
  // A parenthesis in the address belongs to it if it was opened in it: .../Stop_(disambiguation)
  let [end, target] = [LABELLED.lastIndex, href];
  if (count(found[2], "(") > count(found[2], ")") && text[end] === ")") {
    [end, target] = [end + 1, address(`${found[2]})`)];
  }
  const label = found[1] === "" ? [found[2]] : inline(found[1], depth + 1, false);
  return { nodes: [anchor(target, label)], end };
}

function bareLink(text, at) {
  BARE.lastIndex = at;
  const found = BARE.exec(text);
  if (!found || (at > 0 && /\w/.test(text[at - 1]))) return null;
  const bracketed = text[at] === "<" && found[0].endsWith(">");
  // A full stop, or the parenthesis around it, is the sentence's.
  let shown = bracketed ? found[1] : found[1].slice(0, withoutEnd(found[1], ".,;:!?'\"*_~"));
  if (!bracketed && shown.endsWith(")") && count(shown, ")") > count(shown, "(")) {
    shown = shown.slice(0, -1);
  }
  const href = address(shown);
  if (!href || (text[at] === "<" && !bracketed)) return null;
  return { nodes: [anchor(href, [shown])], end: bracketed ? BARE.lastIndex : at + shown.length };
}

/** A whole http or https address, as a browser understands it; else null. */
function address(text) {
  try {
    const url = new URL(text);
    return url.protocol === "http:" || url.protocol === "https:" ? url.href : null;
  } catch {
    return null; // relative, or nonsense
  }
}

function anchor(href, label) {
  const made = element("a", label);
  made.href = href;
  made.target = "_blank";
  made.rel = "noopener noreferrer nofollow";
  return made;
}

function count(text, character) {
  return text.split(character).length - 1;
}
