/**
 * What is within a line of Markdown, as DOM nodes: bold, italic, struck out, code and links.
 *
 * Nothing here parses HTML, and a link leads to http or https or is none. Anything else is shown as
 * it was written.
 */

import { DEEPEST, withoutEnd } from "./blocks.js";

const MARKS = [
  ["**", "strong"],
  ["__", "strong"],
  ["~~", "del"],
  ["*", "em"],
  ["_", "em"],
];
const SPECIAL = /[\\`*_~[!<\n]|https?:\/\//g;

/** A text's nodes: strings and elements. */
export function inline(text, depth = 0, links = true) {
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
  let shown = bracketed ? found[1] : withoutEnd(found[1], ".,;:!?'\"*_~");
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

export function element(name, children = []) {
  const made = document.createElement(name);
  for (const child of children) made.append(child); // one call for all of them has its bounds
  return made;
}
