// The mesh as it is now: a map, figures, and the same in tables.

import { watch } from "../api.js";
import { line } from "../chart.js";
import { announce, h, replace } from "../dom.js";
import { bytes, count, milliseconds, percent, rate, words, duration } from "../format.js";
import { panel } from "../panel.js";
import { pauseButton } from "../pause.js";
import { notice, problem } from "../problem.js";
import { drawMap, ground } from "./map.js";
import { replicasOf, stateOfReplica } from "./states.js";

const NARROW = 700;
const HISTORY = 60;

const FIGURES = [
  { label: "Requests", unit: "/s", value: (mesh) => mesh.traffic?.requests_per_second ?? 0, text: rate },
  { label: "Tokens", unit: "/s", value: (mesh) => mesh.traffic?.completion_tokens_per_second ?? 0, text: rate },
  { label: "TTFT p50", value: (mesh) => mesh.traffic?.time_to_first_token?.p50_ms, text: milliseconds },
  { label: "TTFT p95", value: (mesh) => mesh.traffic?.time_to_first_token?.p95_ms, text: milliseconds },
  { label: "TPOT p50", value: (mesh) => mesh.traffic?.time_per_output_token?.p50_ms, text: milliseconds },
  { label: "In flight", value: (mesh) => mesh.traffic?.active_requests ?? 0, text: count },
  { label: "Failed", value: (mesh) => mesh.traffic?.error_ratio, text: percent },
  { label: "Cache hits", value: (mesh) => mesh.response_cache?.hit_ratio, text: percent },
];

export function mount(main, session) {
  if (!session.operator) {
    replace(main, h("div", { class: "head" }, h("h1", {}, "Mesh")), notice("For operators", "This key may use models, but not see the mesh. A key with operator: true in gateway.auth.keys may."));
    return undefined;
  }
  const trouble = h("div");
  const state = h("span", { class: "badge", role: "status" }, "connecting");
  const card = h("div", { class: "card map-card" });
  const figures = FIGURES.map((figure) => figureView(figure));
  const tables = h("div");
  let paused = false;
  replace(main, h("div", { class: "head" }, h("h1", {}, "Mesh"), state, pauseButton((now) => ((paused = now), show()))), trouble, h("div", { class: "figures" }, figures.map((figure) => figure.element)), card, tables);

  let latest = null;
  let drawn = null;
  let onGround = "";
  const show = () => {
    if (latest === null) return;
    const narrow = card.clientWidth < NARROW;
    const current = ground(latest, narrow);
    if (current !== onGround) {
      onGround = current;
      drawn = drawMap(latest, narrow);
      replace(card, drawn.element);
    } else drawn.update(latest);
    const replicas = replicasOf(latest);
    const away = replicas.filter((replica) => stateOfReplica(replica).kind !== "good");
    const text = away.length ? `${away.length} of ${replicas.length} replicas not serving` : `all ${replicas.length} replicas serving`;
    if (state.textContent !== text) state.textContent = text;
    state.className = `badge ${away.length ? "bad" : "good"}`;
    // A table that is being read with the keys must not go away below them.
    if (!tables.contains(document.activeElement)) replace(tables, replicaTable(latest), h("div", { class: "columns" }, stageTable(latest), errorTable(latest)));
  };
  const sizes = new ResizeObserver(show);
  sizes.observe(card);

  const stopping = new AbortController();
  watch("/api/mesh", {
    signal: stopping.signal,
    onDocument: ({ mesh }) => {
      latest = mesh;
      for (const figure of figures) figure.update(mesh, paused);
      if (!paused) show();
    },
    onProblem: (error) => {
      replace(trouble, error ? problem(error) : null);
      if (error) {
        state.textContent = "not connected";
        state.className = "badge bad";
        announce(error.message);
      }
    },
  });
  return () => {
    stopping.abort();
    sizes.disconnect();
  };
}

function figureView({ label, unit = "", value, text }) {
  const history = [];
  const shown = h("div", { class: "value" });
  const chart = h("div");
  const update = (mesh, paused) => {
    const latest = value(mesh);
    history.push(Number(latest ?? 0));
    if (history.length > HISTORY) history.shift();
    if (paused) return;
    replace(shown, latest === undefined ? "–" : text(latest), unit ? h("span", { class: "unit" }, ` ${unit}`) : null);
    replace(chart, line(history, { label: `${label} over the last ${history.length} seconds` }));
  };
  return { element: h("div", { class: "figure card" }, h("div", { class: "muted small" }, label), shown, chart), update };
}

function replicaTable(mesh) {
  return panel(
    "Replicas",
    ["Replica", "State", ["CPU", "right"], ["Memory", "right wide-only"], ["Calls", "right"], ["p50", "right wide-only"], ["Up for", "right wide-only"], ["Version", "wide-only"]],
    replicasOf(mesh).map((replica) => {
      const { label, kind } = stateOfReplica(replica);
      return [
        [h("strong", {}, replica.service), " ", h("span", { class: "muted mono" }, replica.address), replica.problem && kind !== "good" ? h("div", { class: "small" }, replica.problem) : null],
        h("span", { class: `badge ${kind}` }, label),
        replica.cpu_cores === undefined ? "–" : percent(replica.cpu_cores),
        bytes(replica.memory_bytes),
        `${rate(replica.calls_per_second)}/s`,
        milliseconds(replica.latency?.p50_ms),
        replica.uptime_ms ? duration(Number(replica.uptime_ms) / 1000) : "–",
        replica.version || "–",
      ];
    }),
  );
}

function stageTable(mesh) {
  const stages = mesh.traffic?.stages ?? [];
  const largest = Math.max(1e-9, ...stages.map((stage) => stage.latency?.mean_ms ?? 0));
  return panel(
    "Stages of a request",
    ["Stage", ["p50", "right"], ["p95", "right"], ["p99", "right wide-only"]],
    stages.map(({ stage, latency }) => {
      const fill = h("span");
      fill.style.width = `${((latency?.mean_ms ?? 0) / largest) * 100}%`;
      return [[h("span", { class: "meter" }, fill), stage.replace("_", " ")], milliseconds(latency?.p50_ms), milliseconds(latency?.p95_ms), milliseconds(latency?.p99_ms)];
    }),
  );
}

function errorTable(mesh) {
  const errors = mesh.traffic?.errors ?? [];
  return panel(
    "Failures by reason",
    ["Reason", ["Now", "right"], ["Since start", "right"]],
    errors.map((error) => [words(error.name), `${rate(error.per_second)}/s`, count(error.total)]),
    "None since start.",
  );
}
