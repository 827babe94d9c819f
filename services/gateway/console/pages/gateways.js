// What several gateways have said.

import { h, replace } from "./dom.js";

/** An element that names the gateways that do not answer: what they know is missing from the page. */
export function missingView() {
  const element = h("div", { role: "status" });
  let shown = "";
  const update = (gateways) => {
    const missing = gateways.filter((gateway) => gateway.problem);
    const text = JSON.stringify(missing);
    if (text === shown) return;
    shown = text;
    replace(
      element,
      missing.length
        ? h(
            "div",
            { class: "problem" },
            h("strong", {}, `${missing.length} of ${gateways.length} gateways ${missing.length === 1 ? "does" : "do"} not answer`),
            h("span", { class: "muted" }, "What they know is missing here."),
            h("ul", {}, missing.map((gateway) => h("li", {}, h("code", {}, gateway.address), `: ${gateway.problem}`))),
          )
        : null,
    );
  };
  return { element, update };
}
