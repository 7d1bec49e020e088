// Shows the light markup of answers (a part of Markdown) as elements: paragraphs, headings, lists, quotes, code, bold
// and italic. What is not such markup, HTML included, stays text.

import {make} from "./dom.js";

const FENCE = /^\s*(```+|~~~+)/;
const HEADING = /^#{1,6}\s+(.*)$/;
const ITEM = /^\s*([-*+]|\d{1,4}[.)])\s+(.*)$/;
const DEEPEST = 6; // lists and quotes within each other
const QUOTE = /^>\s?(.*)$/;
const INLINE =
  /(`+)(.{1,300}?)\1|\*\*(\S(?:.{0,300}?\S)?)\*\*|(?<![\w*])\*([^\s*](?:[^*\n]{0,300}[^\s*])?)\*(?![\w*])/g;

export function showMarkup(target, text) {
  target.replaceChildren(...blocks(text.split("\n")));
}

function blocks(lines, level = 0) {
  const made = [];
  let at = 0;
  // The lines from here on that are of one kind.
  const take = (isSame) => {
    const begin = at;
    while (at < lines.length && isSame(lines[at])) at += 1;
    return lines.slice(begin, at);
  };
  while (at < lines.length) {
    const line = lines[at];
    if (!line.trim()) {
      at += 1;
    } else if (FENCE.test(line)) {
      const fence = FENCE.exec(line)[1];
      at += 1;
      const code = take((other) => !other.trim().startsWith(fence));
      at += 1;
      made.push(make("pre", {tabindex: "0"}, make("code", {}, code.join("\n"))));
    } else if (HEADING.test(line)) {
      made.push(make("h4", {}, ...inline(HEADING.exec(line)[1])));
      at += 1;
    } else if (QUOTE.test(line) && level < DEEPEST) {
      const quoted = take((other) => QUOTE.test(other)).map((other) => QUOTE.exec(other)[1]);
      made.push(make("blockquote", {}, ...blocks(quoted, level + 1)));
    } else if (ITEM.test(line)) {
      made.push(
        list(
          take((other) => belongsToList(other, line)),
          level,
        ),
      );
    } else {
      at += 1;
      made.push(make("p", {}, ...inline([line, ...take(isPlain)].join("\n").trim())));
    }
  }
  return made;
}

function isPlain(line) {
  return line.trim() && ![FENCE, HEADING, QUOTE, ITEM].some((kind) => kind.test(line));
}

const depth = (line) => /^\s*/.exec(line)[0].length;
const isNumbered = (line) => /^\s*\d/.test(line);

// A list ends where a list of the other kind begins, but for lists within its items.
function belongsToList(line, first) {
  if (!line.trim()) return false;
  return depth(line) > depth(first) || (ITEM.test(line) && isNumbered(line) === isNumbered(first));
}

// A list of lines of which the first begins an item. Lines that are indented further belong to the item before them.
function list(lines, level) {
  const element = isNumbered(lines[0]) ? make("ol", {start: parseInt(lines[0], 10)}) : make("ul");
  let at = 0;
  while (at < lines.length) {
    const text = ITEM.exec(lines[at])?.[2] ?? lines[at].trim();
    at += 1;
    const begin = at;
    while (at < lines.length && depth(lines[at]) > depth(lines[0])) at += 1;
    const inner = lines.slice(begin, at);
    const nested = level < DEEPEST ? inner.findIndex((line) => ITEM.test(line)) : -1;
    const words = [text, ...inner.slice(0, nested < 0 ? inner.length : nested).map((line) => line.trim())].join("\n");
    element.append(make("li", {}, ...inline(words), nested < 0 ? null : list(inner.slice(nested), level + 1)));
  }
  return element;
}

function inline(text) {
  const parts = [];
  let end = 0;
  for (const match of text.matchAll(INLINE)) {
    parts.push(text.slice(end, match.index));
    const [whole, , code, bold, italic] = match;
    if (code !== undefined) parts.push(make("code", {}, code));
    else if (bold !== undefined) parts.push(make("strong", {}, ...inline(bold)));
    else parts.push(make("em", {}, ...inline(italic)));
    end = match.index + whole.length;
  }
  parts.push(text.slice(end));
  return parts.filter((part) => part !== "");
}
