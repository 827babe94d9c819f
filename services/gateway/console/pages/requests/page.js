// The requests of late, each with a waterfall of its stages.

import { watch } from "../api.js";
import { h, icon, replace } from "../dom.js";
import { clock, count, duration, words } from "../format.js";
import { pauseButton } from "../pause.js";
import { problem } from "../problem.js";
import { outcome, stateOf } from "./outcome.js";
import { strip, waterfall } from "./waterfall.js";

const SHOWN = 100;
const KEPT = 500;
const STATES = [
  ["", "All"],
  ["failed", "Failed"],
  ["done", "Done"],
  ["running", "In flight"],
];

export function mount(main, session) {
  const finished = new Map();
  let inFlight = [];
  const filter = { state: "", tenant: "", model: "", text: "" };
  const open = new Set();

  const trouble = h("div");
  const list = h("div", { class: "card scroll" });
  const summary = h("span", { class: "muted small" });
  let paused = false;
  const select = (name, label) => h("select", { "aria-label": label, onchange: (event) => set(name, event.target.value) });
  const tenants = select("tenant", "Tenant");
  const models = select("model", "Model");
  const states = h(
    "div",
    { class: "actions", role: "group", "aria-label": "Outcome" },
    STATES.map(([value, label]) =>
      h("button", { class: "quiet", "data-state": value, "aria-pressed": String(value === ""), onclick: () => set("state", value) }, label),
    ),
  );
  const search = h("input", { type: "search", placeholder: "Request or trace id", "aria-label": "Request or trace id", oninput: (event) => set("text", event.target.value.trim()) });

  replace(
    main,
    h("div", { class: "head" }, h("h1", {}, "Requests"), summary, pauseButton((now) => ((paused = now), show()))),
    trouble,
    h("div", { class: "filters", role: "search", "aria-label": "Requests" }, states, session.operator ? tenants : null, models, search),
    list,
  );

  function set(name, value) {
    filter[name] = value;
    for (const button of states.children) button.setAttribute("aria-pressed", String(button.dataset.state === filter.state));
    show();
  }

  const wanted = (request) =>
    (!filter.state || stateOf(request) === filter.state) &&
    (!filter.tenant || request.tenant === filter.tenant) &&
    (!filter.model || request.model === filter.model) &&
    (!filter.text || request.request_id.includes(filter.text) || request.trace_id.includes(filter.text));

  function show() {
    const all = [...inFlight, ...finished.values()].sort((a, b) => b.number - a.number);
    choices(tenants, "Every tenant", all, "tenant");
    choices(models, "Every model", all, "model");
    const rows = all.filter(wanted);
    const failures = all.filter((request) => stateOf(request) === "failed").length;
    summary.textContent = `${count(all.length)} of late, ${count(inFlight.length)} in flight, ${count(failures)} failed`;
    if (!rows.length) {
      replace(list, h("p", { class: "empty muted" }, all.length ? "No request fits the filters." : "No request has come since the gateway started."));
      return;
    }
    // A reader's place in the table must outlive what comes meanwhile.
    const focused = document.activeElement?.dataset?.number;
    if (focused === undefined && list.contains(document.activeElement)) return;
    replace(
      list,
      h(
        "table",
        { class: "requests" },
        h("caption", { class: "unseen" }, "Recent requests, the latest first"),
        h("thead", {}, h("tr", {}, HEADINGS.map(([label, kind]) => h("th", { scope: "col", class: kind }, label)))),
        h("tbody", {}, rows.slice(0, SHOWN).map(row)),
      ),
      rows.length > SHOWN ? h("p", { class: "empty muted" }, `${count(rows.length - SHOWN)} more; narrow the filters to see them.`) : null,
    );
    if (focused) list.querySelector(`[data-number="${focused}"]`)?.focus();
  }

  function row(request) {
    const isOpen = open.has(request.number);
    const toggle = () => {
      if (!open.delete(request.number)) open.add(request.number);
      show();
    };
    const button = h(
      "button",
      { class: "quiet expander", "aria-expanded": String(isOpen), "data-number": request.number, onclick: toggle, "aria-label": `${clock(request.arrived_unix_ms)}, stages of request ${request.request_id}` },
      icon(isOpen ? "down" : "right"),
      h("span", { class: "number" }, clock(request.arrived_unix_ms)),
    );
    const cells = h(
      "tr",
      {},
      h("td", {}, button),
      h("td", {}, outcome(request)),
      h("td", { class: "wide-only" }, request.tenant),
      h("td", { class: "wide-only" }, request.model || h("span", { class: "muted" }, "not routed")),
      h("td", { class: "right wide-only" }, `${count(request.prompt_tokens)} → ${count(request.completion_tokens)}`),
      h("td", { class: "right wide-only" }, duration(request.first_text_s)),
      h("td", { class: "right" }, duration(request.duration_s)),
      h("td", { class: "strip-cell" }, strip(request)),
    );
    return isOpen ? [cells, h("tr", { class: "detail" }, h("td", { colspan: HEADINGS.length }, detail(request, session)))] : cells;
  }

  const stopping = new AbortController();
  watch("/api/requests", {
    signal: stopping.signal,
    onDocument: (document) => {
      // A gateway that has started anew counts from one again.
      if (document.first) finished.clear();
      for (const request of document.finished) finished.set(request.number, request);
      for (const number of [...finished.keys()].slice(0, Math.max(0, finished.size - KEPT))) finished.delete(number);
      inFlight = document.in_flight;
      if (!paused) show();
    },
    onProblem: (error) => replace(trouble, error ? problem(error) : null),
  });
  return () => stopping.abort();
}

const HEADINGS = [
  ["Arrived", ""],
  ["Outcome", ""],
  ["Tenant", "wide-only"],
  ["Model", "wide-only"],
  ["Tokens", "right wide-only"],
  ["First token", "right wide-only"],
  ["Duration", "right"],
  ["Stages", "strip-cell"],
];

/** The options of a filter: what the requests have. */
function choices(select, all, requests, name) {
  const values = [...new Set(requests.map((request) => request[name]).filter(Boolean))].sort();
  if (values.join("\n") === select.dataset.values) return;
  const chosen = select.value;
  select.dataset.values = values.join("\n");
  replace(select, h("option", { value: "" }, all), values.map((value) => h("option", { value }, value)));
  select.value = values.includes(chosen) ? chosen : "";
}

function detail(request, session) {
  const fact = (term, ...value) => h("div", {}, h("dt", {}, term), h("dd", {}, value));
  const trace = request.trace_id
    ? session.trace_url
      ? h("a", { href: session.trace_url.replaceAll("{trace_id}", request.trace_id), target: "_blank", rel: "noopener noreferrer" }, h("code", {}, request.trace_id))
      : h("code", {}, request.trace_id)
    : h("span", { class: "muted" }, "not recorded");
  return h(
    "div",
    { class: "stack" },
    waterfall(request),
    h(
      "dl",
      { class: "facts-list" },
      fact("Request", h("code", {}, request.request_id)),
      fact("Trace", trace),
      fact("Tenant", request.tenant),
      fact("Model", request.model || "not routed"),
      fact("Kind", `${words(request.operation)}${request.streaming ? ", streamed" : ""}`),
      fact("Prompt", `${count(request.prompt_tokens)} tokens${request.cached_prompt_tokens ? `, ${count(request.cached_prompt_tokens)} of them in the prefix cache` : ""}`),
      fact("Answer", `${count(request.completion_tokens)} tokens${request.cached ? ", from the response cache" : ""}`),
      fact("First token", duration(request.first_text_s)),
      fact("Ended by", request.reason ? h("code", {}, request.reason) : request.finish_reasons.map(words).join(", ") || "–"),
    ),
  );
}
