// A little Markdown as elements: code, emphasis, headings, lists. Everything else stays text, links
// and pictures too: what a model writes loads nothing and leads nowhere.

import { h } from "../dom.js";

const INLINE = /(`[^`\n]+`|\*\*[^*\n]+\*\*|\*[^*\s][^*\n]*\*)/;

/** The elements of a text. */
export function markdown(text) {
  const blocks = [];
  // A fence that has not been closed yet is one all the same: text comes bit by bit.
  for (const [position, part] of text.split(/^```/m).entries()) {
    if (position % 2 === 0) blocks.push(...paragraphs(part));
    else {
      const [, language, code] = part.match(/^([^\n]*)\n?([\s\S]*)$/);
      blocks.push(h("pre", { tabindex: 0, role: "region", "aria-label": `Code ${language}`.trim() }, h("code", {}, code.replace(/\n$/, ""))));
    }
  }
  return blocks;
}

function paragraphs(text) {
  const blocks = [];
  let lines = [];
  let list = null;
  const flush = () => {
    if (lines.length) blocks.push(h("p", {}, inline(lines.join("\n"))));
    lines = [];
  };
  for (const line of text.split("\n")) {
    const heading = line.match(/^#{1,6} +(.+)$/);
    const item = line.match(/^ {0,6}(?:([-*•])|(\d{1,3})[.)]) +(.+)$/);
    if (item) {
      flush();
      const kind = item[1] ? "ul" : "ol";
      if (list?.localName !== kind) blocks.push((list = h(kind, item[2] ? { start: item[2] } : {})));
      list.append(h("li", {}, inline(item[3])));
      continue;
    }
    if (line.trim() !== "") list = null;
    if (heading) {
      flush();
      blocks.push(h("p", { class: "heading" }, inline(heading[1])));
    } else if (line.trim() === "") flush();
    else lines.push(line);
  }
  flush();
  return blocks;
}

function inline(text) {
  return text.split(INLINE).map((part, position) => {
    if (position % 2 === 0) return part;
    if (part.startsWith("`")) return h("code", {}, part.slice(1, -1));
    if (part.startsWith("**")) return h("strong", {}, part.slice(2, -2));
    return h("em", {}, part.slice(1, -1));
  });
}
