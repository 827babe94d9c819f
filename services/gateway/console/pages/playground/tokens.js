// An answer token by token, each coloured by how likely it was; the keys move from one to the next.

import { h, replace } from "../dom.js";
import { percent } from "../format.js";

const LIKELY = [0.9, 0.6, 0.3, 0.1];

/** 0 for a likely token, 4 for one that hardly was. */
const level = (probability) => LIKELY.filter((limit) => probability < limit).length;

/** Shows what cannot be seen. */
const visible = (text) => (text === "" ? "∅" : text.replaceAll("\n", "↵\n").replaceAll("\t", "→\t"));
/** The replacement character stands for bytes that only with others make a character. */
const spelt = (text) => (text === "" ? "no text" : text.includes("\ufffd") ? "part of a character" : JSON.stringify(text));

/** A list of tokens beside a card with the alternatives of one of them. */
export function tokenView(tokens) {
  const card = h("div", { class: "alternatives card", "aria-hidden": "true" });
  let active = -1;
  const options = tokens.map((token, position) =>
    h(
      "span",
      {
        role: "option",
        id: `token-${crypto.randomUUID()}`,
        class: `token level-${level(Math.exp(token.logprob))}`,
        "aria-selected": "false",
        "aria-label": describe(token),
        onpointerenter: () => select(position),
      },
      visible(token.text),
    ),
  );
  const list = h(
    "div",
    {
      class: "tokens",
      role: "listbox",
      tabindex: 0,
      "aria-label": "Tokens and their probabilities; the arrow keys move",
      onkeydown: (event) => {
        const steps = { ArrowRight: 1, ArrowDown: 1, ArrowLeft: -1, ArrowUp: -1, Home: -Infinity, End: Infinity };
        if (!(event.key in steps)) return;
        event.preventDefault();
        select(Math.max(0, Math.min(options.length - 1, active + steps[event.key])));
      },
      onfocus: () => select(Math.max(0, active)),
    },
    options,
  );
  const select = (position) => {
    options[active]?.setAttribute("aria-selected", "false");
    active = position;
    options[active].setAttribute("aria-selected", "true");
    list.setAttribute("aria-activedescendant", options[active].id);
    replace(card, alternatives(tokens[active]));
  };
  if (tokens.length) replace(card, h("span", { class: "muted small" }, "Point at a token, or move with the arrow keys."));
  return h("div", { class: "token-view" }, list, card);
}

function describe(token) {
  const others = token.top.filter((each) => !each.chosen).map((each) => `${spelt(each.text)} ${percent(Math.exp(each.logprob))}`);
  return `${spelt(token.text)}, ${percent(Math.exp(token.logprob))}${others.length ? `; instead: ${others.join(", ")}` : ""}`;
}

function alternatives(token) {
  const rows = token.top.some((each) => each.chosen) ? token.top : [...token.top, { ...token, chosen: true }];
  return rows.map((each) => {
    const probability = Math.exp(each.logprob);
    const bar = h("span", { class: "probability" });
    bar.style.width = `${Math.max(1, probability * 100)}%`;
    return h(
      "div",
      { class: each.chosen ? "alternative chosen" : "alternative" },
      h("code", {}, spelt(each.text)),
      h("span", { class: "number" }, percent(probability)),
      h("span", { class: "track" }, bar),
    );
  });
}
