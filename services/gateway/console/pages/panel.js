// A table on a card.

import { h } from "./dom.js";

/** A card with a table. A heading, and each cell below it, may have a class: `[label, class]`. */
export function panel(title, headings, rows, empty = "Nothing yet.") {
  const columns = headings.map((heading) => (Array.isArray(heading) ? heading : [heading, ""]));
  return h(
    "section",
    { class: "card panel scroll", "aria-label": title, tabindex: 0 },
    h("h2", {}, title),
    rows.length
      ? h(
          "table",
          {},
          h("thead", {}, h("tr", {}, columns.map(([label, kind]) => h("th", { scope: "col", class: kind }, label)))),
          h("tbody", {}, rows.map((cells) => h("tr", {}, cells.map((cell, position) => h("td", { class: columns[position][1] }, cell))))),
        )
      : h("p", { class: "muted" }, empty),
  );
}
