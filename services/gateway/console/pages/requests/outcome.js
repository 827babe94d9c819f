// How a request went.

import { h } from "../dom.js";
import { words } from "../format.js";

/** `running`, `done`, `left` (its caller went away) or `failed`. */
export function stateOf(request) {
  if (request.in_flight) return "running";
  if (request.reason === "CANCELLED") return "left";
  return request.reason ? "failed" : "done";
}

/** Why the choices of a request ended. */
export const endings = (request) => request.finish_reasons.map((reason) => words(reason.replace("FINISH_REASON_", ""))).join(", ");

const KINDS = { running: "accent", done: "good", left: "", failed: "bad" };

/** The outcome in a word or two. */
export function outcome(request) {
  const state = stateOf(request);
  const label = {
    running: "In flight",
    left: "Caller left",
    failed: words(request.reason),
    done: request.cached ? "From cache" : endings(request) || "Done",
  }[state];
  return h("span", { class: `badge ${KINDS[state]}` }, label);
}
