// What went wrong, why, and what to do.

import { h } from "./dom.js";
import { duration, words } from "./format.js";

/** A card for a CallError, with a button to try again where that may help. */
export function problem(error, { retry = null } = {}) {
  return h(
    "div",
    { class: "problem", role: "alert" },
    h("strong", {}, words(error.reason ?? "A defect of the console")),
    h("span", {}, error.message),
    error.remedy ? h("span", { class: "muted" }, error.remedy.replaceAll("`", "")) : null,
    error.retryAfterS ? h("span", { class: "muted" }, `Wait ${duration(error.retryAfterS)} before you try again.`) : null,
    error.requestId ? h("span", { class: "muted small" }, "Request ", h("code", {}, error.requestId)) : null,
    retry ? h("div", { class: "actions" }, h("button", { onclick: retry }, "Try again")) : null,
  );
}

/** A card that tells what is missing, where nothing went wrong. */
export function notice(title, text) {
  return h("div", { class: "problem notice" }, h("strong", {}, title), h("span", { class: "muted" }, text));
}
