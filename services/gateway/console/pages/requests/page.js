// The requests of late, each with a waterfall of its stages.

import { watch } from "../api.js";
import { h, icon, replace } from "../dom.js";
import { clock, count, milliseconds, words } from "../format.js";
import { missingView } from "../gateways.js";
import { pauseButton } from "../pause.js";
import { problem } from "../problem.js";
import { endings, outcome, stateOf } from "./outcome.js";
import { strip, waterfall } from "./waterfall.js";

const SHOWN = 100;
const KEPT = 1000;
// As in styles/pages.css: fewer columns are shown there.
const narrow = matchMedia("(max-width: 760px)");
const STATES = [
  ["", "All"],
  ["failed", "Failed"],
  ["done", "Done"],
  ["running", "In flight"],
];

export function mount(main, session) {
  const finished = new Map();
  let gateways = [];
  const filter = { state: "", gateway: "", tenant: "", model: "", text: "" };
  const open = new Set();

  const trouble = h("div");
  const missing = missingView();
  const list = h("div", { class: "card scroll" });
  const summary = h("span", { class: "muted small" });
  let paused = false;
  const select = (name, label) => h("select", { "aria-label": label, onchange: (event) => set(name, event.target.value) });
  const places = select("gateway", "Gateway");
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
    missing.element,
    h("div", { class: "filters", role: "search", "aria-label": "Requests" }, states, places, session.operator ? tenants : null, models, search),
    list,
  );

  function set(name, value) {
    filter[name] = value;
    for (const button of states.children) button.setAttribute("aria-pressed", String(button.dataset.state === filter.state));
    show();
  }

  const wanted = (request) =>
    (!filter.state || stateOf(request) === filter.state) &&
    (!filter.gateway || request.gateway === filter.gateway) &&
    (!filter.tenant || request.tenant === filter.tenant) &&
    (!filter.model || request.model === filter.model) &&
    (!filter.text || request.request_id.includes(filter.text) || request.trace_id.includes(filter.text));

  function show() {
    const all = [...gateways.flatMap((gateway) => gateway.inFlight), ...finished.values()].sort((a, b) => b.arrivedAt - a.arrivedAt || b.number - a.number);
    missing.update(gateways);
    places.hidden = choices(places, "Every gateway", all, "gateway") < 2;
    choices(tenants, "Every tenant", all, "tenant");
    choices(models, "Every model", all, "model");
    const rows = all.filter(wanted);
    const failures = all.filter((request) => stateOf(request) === "failed").length;
    const inFlight = gateways.reduce((sum, gateway) => sum + (gateway.in_flight_total ?? 0), 0);
    summary.textContent = `${count(all.length)} of late, ${count(inFlight)} in flight, ${count(failures)} failed`;
    if (!rows.length) {
      replace(list, h("p", { class: "empty muted" }, all.length ? "No request fits the filters." : "No request has come yet."));
      return;
    }
    // A reader's place in the table must outlive what comes meanwhile.
    const focused = document.activeElement?.dataset?.request;
    if (focused === undefined && list.contains(document.activeElement)) return;
    replace(
      list,
      h(
        "table",
        { class: "requests" },
        h("caption", { class: "unseen" }, "Recent requests, the latest first"),
        h("thead", {}, h("tr", {}, HEADINGS.map(([label, kind]) => h("th", { scope: "col", class: kind }, label)))),
        h("tbody", {}, rows.slice(0, SHOWN).map((request) => row(request, !places.hidden))),
      ),
      rows.length > SHOWN ? h("p", { class: "empty muted" }, `${count(rows.length - SHOWN)} more; narrow the filters to see them.`) : null,
    );
    if (focused) list.querySelector(`[data-request="${focused}"]`)?.focus();
  }

  function row(request, hasPlace) {
    const isOpen = open.has(request.key);
    const toggle = () => {
      if (!open.delete(request.key)) open.add(request.key);
      show();
    };
    const button = h(
      "button",
      { class: "quiet expander", "aria-expanded": String(isOpen), "data-request": request.key, onclick: toggle, "aria-label": `${clock(request.arrivedAt)}, stages of request ${request.request_id}` },
      icon(isOpen ? "down" : "right"),
      h("span", { class: "number" }, clock(request.arrivedAt)),
    );
    const cells = h(
      "tr",
      {},
      h("td", {}, button),
      h("td", {}, outcome(request)),
      h("td", { class: "wide-only" }, request.tenant),
      h("td", { class: "wide-only" }, request.model || h("span", { class: "muted" }, "not routed")),
      h("td", { class: "right wide-only" }, `${count(request.usage.prompt_tokens)} → ${count(request.usage.completion_tokens)}`),
      h("td", { class: "right wide-only" }, milliseconds(request.first_text_ms)),
      h("td", { class: "right" }, milliseconds(request.duration_ms)),
      h("td", { class: "strip-cell" }, strip(request)),
    );
    return isOpen ? [cells, h("tr", { class: "detail" }, h("td", { colspan: narrow.matches ? HEADINGS.filter(([, kind]) => kind === "" || kind === "right").length : HEADINGS.length }, detail(request, session, hasPlace)))] : cells;
  }

  /** What one gateway has said, as the page keeps it. */
  function take({ finished: ended = [], in_flight: running = [], ...gateway }) {
    const known = (request) => ({
      ...request,
      key: `${gateway.instance_id}-${request.number}`,
      gateway: gateway.address,
      arrivedAt: Date.parse(request.arrival_time),
    });
    for (const request of ended.map(known)) finished.set(request.key, request);
    return { ...gateway, inFlight: running.map(known) };
  }

  const stopping = new AbortController();
  watch("/api/requests", {
    signal: stopping.signal,
    onDocument: (document) => {
      gateways = document.gateways.map(take);
      for (const request of [...finished.keys()].slice(0, Math.max(0, finished.size - KEPT))) finished.delete(request);
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

/** The options of a filter: what the requests have. Returns how many there are. */
function choices(select, all, requests, name) {
  // What is chosen stays one of them, whether or not there is such a request still.
  const values = [...new Set([...requests.map((request) => request[name]), select.value].filter(Boolean))].sort();
  if (values.join("\n") === select.dataset.values) return values.length;
  const chosen = select.value;
  select.dataset.values = values.join("\n");
  replace(select, h("option", { value: "" }, all), values.map((value) => h("option", { value }, value)));
  select.value = chosen;
  return values.length;
}

function detail(request, session, hasPlace) {
  const fact = (term, ...value) => h("div", {}, h("dt", {}, term), h("dd", {}, value));
  const { prompt_tokens: prompt, cached_prompt_tokens: reused, completion_tokens: completion } = request.usage;
  const preempted = request.preemptions ? `, put back in its queue ${count(request.preemptions)} times` : "";
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
      fact("Prompt", `${count(prompt)} tokens${reused ? `, ${count(reused)} of them in the prefix cache` : ""}`),
      fact("Answer", `${count(completion)} tokens${request.cached ? ", from the response cache" : ""}`),
      fact("First token", milliseconds(request.first_text_ms)),
      request.engine_steps ? fact("Engine", `${count(request.engine_steps)} steps${preempted}`) : null,
      fact("Ended by", request.reason ? h("code", {}, request.reason) : endings(request) || "–"),
      hasPlace ? fact("Gateway", h("code", {}, request.gateway)) : null,
    ),
  );
}
