// A little Markdown as elements: code, emphasis, headings, lists, tables, quotes. Everything else stays
// text, links and pictures too: what a model writes loads nothing and leads nowhere.

import { copy, h, icon } from "../dom.js";

const INLINE = /(`[^`\n]+`|\*\*[^*\n]+\*\*|\*[^*\s][^*\n]*\*)/;
const ITEM = /^( {0,12})(?:([-*•+])|(\d{1,3})[.)]) +(.+)$/;
const RULE = /^ {0,3}([-*_])(?: *\1){2,} *$/;
const ROW = /^ *\|(.+)\| *$/;
const BELOW_HEADINGS = /^ *\|(?: *:?-+:? *\|)+ *$/;

/** The elements of a text; `whole` says that nothing of it is still to come. */
export function markdown(text, { whole }) {
  const blocks = [];
  // A fence that has not been closed yet is one all the same: text comes bit by bit.
  for (const [position, part] of text.split(/^ *```/m).entries()) {
    if (position % 2 === 0) blocks.push(...blocksOf(part.split("\n")));
    else {
      const [, language, code] = part.match(/^([^\n]*)\n?([\s\S]*)$/);
      blocks.push(codeView(language.trim(), code.replace(/\n *$/, ""), whole));
    }
  }
  return blocks;
}

function codeView(language, code, whole) {
  const button = h("button", { class: "quiet", onclick: () => copy(code, button) }, icon("copy"), "Copy code");
  return h(
    "div",
    { class: "code-view" },
    h("div", { class: "code-head" }, h("span", { class: "muted small" }, language), whole ? button : null),
    h("pre", { tabindex: 0, role: "region", "aria-label": `Code ${language}`.trim() }, h("code", {}, code)),
  );
}

function blocksOf(lines) {
  const blocks = [];
  let paragraph = [];
  // The lists that the line before is in, the outermost first.
  let lists = [];
  const flush = () => {
    if (paragraph.length) blocks.push(h("p", {}, inline(paragraph.join("\n"))));
    paragraph = [];
  };
  const add = (block) => {
    flush();
    lists = [];
    if (block) blocks.push(block);
  };
  for (let at = 0; at < lines.length; at += 1) {
    const line = lines[at];
    const heading = line.match(/^(#{1,6}) +(.+?) *#*$/);
    const item = RULE.test(line) ? null : line.match(ITEM);
    if (item) {
      flush();
      lists = withItem(lists, item, blocks);
    } else if (heading) add(h("p", { class: `heading level-${Math.min(3, heading[1].length)}` }, inline(heading[2])));
    else if (RULE.test(line)) add(h("hr"));
    else if (/^ {0,3}>/.test(line)) {
      const begin = at;
      while (at + 1 < lines.length && /^ {0,3}>/.test(lines[at + 1])) at += 1;
      add(h("blockquote", {}, blocksOf(lines.slice(begin, at + 1).map((each) => each.replace(/^ {0,3}> ?/, "")))));
    } else if (ROW.test(line) && BELOW_HEADINGS.test(lines[at + 1] ?? "")) {
      const begin = at;
      at += 1;
      while (at + 1 < lines.length && ROW.test(lines[at + 1])) at += 1;
      add(tableView(line, lines.slice(begin + 2, at + 1)));
    } else if (line.trim() === "") flush();
    else {
      lists = [];
      paragraph.push(line);
    }
  }
  flush();
  return blocks;
}

/** Adds an item to the list that its indent makes it one of; returns the lists that it is in. */
function withItem(lists, [, indent, bullet, number, text], blocks) {
  const kind = bullet ? "ul" : "ol";
  const outer = lists.filter((list) => list.indent < indent.length);
  let list = lists.find((each) => each.indent === indent.length && each.element.localName === kind);
  if (list === undefined) {
    list = { indent: indent.length, element: h(kind, number ? { start: number } : {}) };
    const parent = outer.at(-1)?.element.lastElementChild;
    if (parent) parent.append(list.element);
    else blocks.push(list.element);
  }
  list.element.append(h("li", {}, inline(text)));
  return [...outer, list];
}

function tableView(headings, rows) {
  const cells = (line) => line.match(ROW)[1].split("|").map((cell) => inline(cell.trim()));
  return h(
    "div",
    { class: "scroll", tabindex: 0, role: "region", "aria-label": "Table" },
    h("table", {}, h("thead", {}, h("tr", {}, cells(headings).map((cell) => h("th", { scope: "col" }, cell)))), h("tbody", {}, rows.map((row) => h("tr", {}, cells(row).map((cell) => h("td", {}, cell)))))),
  );
}

function inline(text) {
  return text.split(INLINE).map((part, position) => {
    if (position % 2 === 0) return part;
    if (part.startsWith("`")) return h("code", {}, part.slice(1, -1));
    if (part.startsWith("**")) return h("strong", {}, part.slice(2, -2));
    return h("em", {}, part.slice(1, -1));
  });
}
