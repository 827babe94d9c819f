// The map: services with their replicas, and the calls between them as moving lines.

import { s } from "../dom.js";
import { bytes, milliseconds, percent, rate } from "../format.js";
import { CLIENTS, layout, route } from "./layout.js";
import { replicasOf, stateOfReplica } from "./states.js";

const KV_HIGH = 0.9;
// [calls per second, seconds that a dot takes to the next one]
const PACES = [[100, 0.35], [10, 0.6], [1, 1.2], [0, 2.4]];
const SHORT = { gateway: "Gateway", tokenizer: "Tokenizer", safety: "Safety", engine: "Engine", cache: "Cache", valkey: "Valkey" };

/** What a drawing stands on: while it is the same, a drawing is only updated. */
export const ground = (mesh, narrow) =>
  JSON.stringify([narrow, (mesh.services ?? []).map((each) => [each.service, (each.replicas ?? []).map((one) => [one.address, Boolean(one.problem)])]), linksOf(mesh).map((link) => [link.from_service, link.to_service])]);

/** Draws a snapshot; `update` of the result shows another one on the same ground. */
export function drawMap(mesh, narrow) {
  const plan = layout(mesh.services ?? [], linksOf(mesh), narrow);
  const updates = [];
  const links = linksOf(mesh).filter((link) => plan.boxes.has(link.from_service) && plan.boxes.has(link.to_service));
  const lines = links.map((link) => lineOf(plan, link, updates));
  const boxes = [...plan.boxes.values()].map((each) => boxOf(each, plan, updates));
  const element = s("svg", { class: "map", role: "img", viewBox: `0 0 ${plan.width} ${plan.height}` }, lines.map((line) => line.path), boxes, lines.map((line) => line.pill));
  const update = (latest) => {
    for (const each of updates) each(latest);
    const replicas = replicasOf(latest);
    const serving = replicas.filter((replica) => stateOfReplica(replica).kind === "good").length;
    element.setAttribute("aria-label", `Map of the mesh: ${serving} of ${replicas.length} replicas serve; the tables below tell the same`);
  };
  update(mesh);
  return { element, update };
}

/** The calls between services, and what clients ask of the gateways. */
function linksOf(mesh) {
  const traffic = mesh.traffic ?? {};
  const front = { from_service: CLIENTS, to_service: "gateway", calls_per_second: traffic.requests_per_second, error_ratio: traffic.error_ratio, latency: traffic.duration };
  return [front, ...(mesh.links ?? [])];
}

const find = (mesh, link) => linksOf(mesh).find((each) => each.from_service === link.from_service && each.to_service === link.to_service) ?? {};
const described = (link) => `${rate(link.calls_per_second)}/s${link.latency ? ` · ${milliseconds(link.latency.p50_ms)}` : ""}`;

function lineOf(plan, link, updates) {
  const { path, label } = route(plan, link.from_service, link.to_service);
  const edge = s("path", { class: "edge", d: path, "stroke-width": 1.5 });
  const flow = s("path", { class: "flow", d: path, "stroke-width": 4 });
  const text = s("text", { class: "dim number", "text-anchor": "middle", x: label?.x, y: label ? label.y + 4 : null });
  const ground = s("rect", { class: "pill", rx: 10, height: 20, y: label ? label.y - 10 : null });
  updates.push((mesh) => {
    const latest = find(mesh, link);
    const calls = latest.calls_per_second ?? 0;
    const failing = (latest.error_ratio ?? 0) > 0.01;
    edge.setAttribute("stroke-width", (1.5 + Math.min(4, Math.log10(1 + calls) * 1.6)).toFixed(1));
    edge.classList.toggle("failing", failing);
    flow.classList.toggle("failing", failing);
    flow.style.setProperty("--pace", `${PACES.find(([limit]) => calls > limit)?.[1] ?? 1}s`);
    flow.setAttribute("visibility", calls > 0 ? "visible" : "hidden");
    text.textContent = described(latest);
    const width = text.textContent.length * 6 + 18;
    ground.setAttribute("width", width);
    ground.setAttribute("x", (label?.x ?? 0) - width / 2);
  });
  return { path: [edge, flow], pill: label ? s("g", {}, ground, text) : null };
}

function boxOf(box, plan, updates) {
  const { x, y, width, height } = box;
  const group = s("g", {}, s("rect", { class: "box", x, y, width, height, rx: 10 }));
  if (box.service === CLIENTS) {
    const active = s("text", { class: "dim", x: x + width / 2, y: y + 38, "text-anchor": "middle" });
    updates.push((mesh) => (active.textContent = `${mesh.traffic?.active_requests ?? 0} in flight`));
    group.append(s("text", { class: "title", x: x + width / 2, y: y + 21, "text-anchor": "middle" }, "Clients"), active);
    return group;
  }
  const side = s("text", { class: "dim number", x: x + width - 12, y: y + 22, "text-anchor": "end" });
  updates.push((mesh) => {
    const service = mesh.services.find((each) => each.service === box.service);
    const enabled = service.enabled ?? false;
    group.classList.toggle("off", !enabled);
    const replicas = service.replicas ?? [];
    const link = plan.narrow ? linksOf(mesh).find((each) => each.to_service === box.service) : null;
    side.textContent = !enabled ? "off" : link ? described(link) : `${replicas.length} ${replicas.length === 1 ? "replica" : "replicas"}`;
  });
  group.append(s("text", { class: "title", x: x + 12, y: y + 22 }, SHORT[box.service]), side);
  if (!box.rows.length) group.append(s("text", { class: "dim", x: x + 12, y: y + 44 }, "no replica is known"));
  group.append(...box.rows.map((row) => rowOf(box, row, updates)));
  return group;
}

function rowOf(box, row, updates) {
  const x = box.x + 8;
  const width = box.width - 16;
  const ground = s("rect", { class: "replica", x, y: row.y, width, height: row.height, rx: 6 });
  const health = s("circle", { class: "health", cx: x + 13, cy: row.y + 15, r: 4.5 });
  const name = s("text", { x: x + 25, y: row.y + 19 });
  const load = s("text", { class: "dim number", x: x + width - 9, y: row.y + 19, "text-anchor": "end" });
  const problem = s("text", { class: "bad-text dim", x: x + 25, y: row.y + row.height - 8 });
  const more = box.service === "engine" ? engineGauges(x, row.y + 28, width) : null;
  updates.push((mesh) => {
    const replica = replicasOf(mesh).find((each) => each.address === row.address && each.service === box.service);
    if (replica === undefined) return;
    const { kind, label } = stateOfReplica(replica);
    for (const element of [ground, health]) {
      element.classList.toggle("bad", kind === "bad");
      element.classList.toggle("warn", kind === "warn");
    }
    name.textContent = shortened(replica.address, kind === "good" ? 22 : 16);
    load.textContent = kind === "good" ? [replica.cpu_cores === undefined ? null : `${Math.round(replica.cpu_cores * 100)} %`, replica.memory_bytes ? bytes(replica.memory_bytes) : null].filter(Boolean).join(" · ") : label;
    load.classList.toggle("bad-text", kind === "bad");
    problem.textContent = replica.problem ? shortened(replica.problem, Math.floor(width / 7), false) : "";
    more?.update(replica.engine ?? {});
  });
  return s("g", {}, ground, health, name, load, problem, more?.element ?? null);
}

/** Sequences, tokens and the use of the KV cache. */
function engineGauges(x, y, width) {
  const left = x + 25;
  const right = x + width - 9;
  const track = { x: left, y: y + 22, width: right - left - 62, height: 6, rx: 3 };
  const sequences = s("text", { class: "dim number", x: left, y: y + 11 });
  const tokens = s("text", { class: "dim number", x: right, y: y + 11, "text-anchor": "end" });
  const used = s("text", { class: "dim number", x: right, y: y + 29, "text-anchor": "end" });
  const fill = s("rect", { class: "gauge-fill", ...track, width: 0 });
  const update = (engine) => {
    const ratio = Number(engine.kv_blocks_used ?? 0) / Math.max(1, Number(engine.kv_blocks ?? 0));
    sequences.textContent = `${engine.running_sequences ?? 0} running · ${engine.waiting_sequences ?? 0} waiting`;
    tokens.textContent = `${rate(engine.generated_tokens_per_second)} tok/s`;
    used.textContent = `KV ${percent(ratio)}`;
    fill.setAttribute("width", (track.width * ratio).toFixed(1));
    fill.classList.toggle("high", ratio > KV_HIGH);
  };
  return { element: s("g", {}, sequences, tokens, s("rect", { class: "gauge", ...track }), fill, used), update };
}

/** A text of at most so many characters; of an address the end matters more. */
function shortened(text, length, keepEnd = true) {
  if (text.length <= length) return text;
  return keepEnd ? `…${text.slice(1 - length)}` : `${text.slice(0, length - 1)}…`;
}
