// One message of the conversation, and what can be done with it.

import { bars } from "../chart.js";
import { copy, h, icon, replace } from "../dom.js";
import { count, duration, milliseconds, rate } from "../format.js";
import { problem } from "../problem.js";
import { CallError } from "../api.js";
import { timing } from "./generation.js";
import { markdown } from "./markdown.js";
import { tokenView } from "./tokens.js";

const FINISHES = {
  length: "cut at the limit of tokens",
  content_filter: "ended by the safety filter",
  aborted: "aborted",
};

/** The element of a message. `actions` are called with the message: edit, regenerate, turn, code. */
export function messageView(node, conversation, actions) {
  return node.role === "user" ? userView(node, conversation, actions) : answerView(node, conversation, actions);
}

function userView(node, conversation, actions) {
  const element = h("article", { class: "message user", "aria-label": "You" });
  const show = () =>
    replace(
      element,
      h("div", { class: "bubble" }, node.content),
      h(
        "div",
        { class: "actions" },
        branches(node, conversation, actions),
        h("button", { class: "quiet", onclick: edit, "data-action": "edit" }, icon("edit"), "Edit"),
      ),
    );
  const edit = () => {
    const field = h("textarea", { rows: Math.min(10, node.content.split("\n").length + 1), "aria-label": "Your message", value: node.content });
    const send = () => field.value.trim() && actions.edit(node, field.value);
    field.addEventListener("keydown", (event) => {
      if (event.key === "Escape") cancel();
      if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) send();
    });
    const cancel = () => {
      show();
      element.querySelector("[data-action=edit]").focus();
    };
    replace(
      element,
      h(
        "div",
        { class: "editing stack" },
        field,
        h("div", { class: "actions" }, h("button", { class: "primary", onclick: send }, "Send as a branch"), h("button", { onclick: cancel }, "Cancel")),
      ),
    );
    field.focus();
  };
  show();
  return element;
}

function answerView(node, conversation, actions) {
  const body = h("div", { class: "answer" });
  const facts = h("div", { class: "facts" });
  const element = h("article", { class: "message model", "aria-label": `Answer of ${node.model}` });
  const controls = h("div", { class: "actions" });

  element.update = () => {
    const running = node.state === "running";
    element.setAttribute("aria-busy", String(running));
    // While text comes it is shown as text: tokens are for reading in peace.
    if (node.view === "tokens" && !running) replace(body, tokenView(node.tokens));
    else if (node.content === "" && running) replace(body, h("span", { class: "waiting", "aria-label": "Waiting for the first token" }));
    else replace(body, markdown(node.content, { whole: !running }));
    replace(facts, timingView(node));
    if (running) replace(controls);
    else {
      replace(
        controls,
        branches(node, conversation, actions),
        node.tokens.length ? viewSwitch(node, element.update) : null,
        copyButton(node),
        h("button", { class: "quiet", onclick: () => actions.regenerate(node) }, icon("again"), "Regenerate"),
        h("button", { class: "quiet", onclick: () => actions.code(node) }, icon("code"), "Code"),
      );
    }
  };
  element.fail = () => {
    const error = new CallError({ ...node.error, retry_after_s: node.error.retryAfterS, metadata: { request_id: node.error.requestId } });
    element.append(problem(error, { retry: () => actions.regenerate(node) }));
  };
  replace(element, h("div", { class: "speaker" }, node.model), body, facts, controls);
  element.update();
  if (node.error) element.fail();
  return element;
}

function branches(node, conversation, actions) {
  const { position, count: siblings } = conversation.branch(node);
  if (siblings === 1) return null;
  const turn = (step, name, label) =>
    h("button", { class: "quiet", disabled: step < 0 ? position === 1 : position === siblings, "aria-label": label, onclick: () => actions.turn(node, step) }, icon(name));
  return h(
    "span",
    { class: "branches", role: "group", "aria-label": "Branches" },
    turn(-1, "left", "The branch before"),
    h("span", { class: "number small" }, `${position} / ${siblings}`),
    turn(1, "right", "The next branch"),
  );
}

function viewSwitch(node, update) {
  const set = (view) => () => {
    node.view = view;
    update();
  };
  return h(
    "span",
    { class: "actions", role: "group", "aria-label": "Shown as" },
    h("button", { class: "quiet", "aria-pressed": String(node.view !== "tokens"), onclick: set("text") }, "Text"),
    h("button", { class: "quiet", "aria-pressed": String(node.view === "tokens"), onclick: set("tokens") }, "Tokens"),
  );
}

function copyButton(node) {
  const button = h("button", { class: "quiet", onclick: () => copy(node.content, button) }, icon("copy"), "Copy");
  return button;
}

const engineText = ({ queue_ms: queue, prefill_ms: prefill, decode_ms: decode }) => [queue, prefill, decode].filter((each) => each !== undefined).map(milliseconds).join(" + ");

function timingView(node) {
  const measured = timing(node);
  if (measured === null) return null;
  const tokens = node.usage?.completion_tokens ?? node.arrivals.reduce((sum, [, some]) => sum + some, 0);
  const gaps = measured.gaps.map(([gap]) => gap * 1000);
  const sorted = [...gaps].sort((a, b) => a - b);
  const median = sorted[Math.floor(sorted.length / 2)];
  const fact = (label, value, title) => h("span", { class: "fact", title }, h("span", { class: "muted" }, label), " ", h("span", { class: "number" }, value));
  return [
    fact("first token", duration(measured.firstS), "From the request to the first text that this browser got"),
    measured.perSecond ? fact("then", `${rate(measured.perSecond)} tokens/s`, "Tokens after the first, over the time they took") : null,
    fact("tokens", node.usage?.prompt_tokens ? `${count(node.usage.prompt_tokens)} → ${count(tokens)}` : count(tokens), "Of the prompt, and of the answer"),
    node.timings?.prefill_ms === undefined ? null : fact("engine", engineText(node.timings), "Wait in the engine's queue, then the prompt, then the answer"),
    gaps.length > 2
      ? h("span", { class: "fact spark" }, bars(gaps, { label: `Time between tokens: median ${median.toFixed(1)} ms, longest ${sorted.at(-1).toFixed(1)} ms, over ${gaps.length} messages` }), h("span", { class: "muted number" }, duration(median / 1000)))
      : null,
    node.cached ? h("span", { class: "badge accent" }, "from the cache") : null,
    FINISHES[node.finish] ? h("span", { class: "badge warn" }, FINISHES[node.finish]) : null,
    node.state === "stopped" ? h("span", { class: "badge" }, "stopped by you") : null,
  ];
}
