// The stages of a request along its time.

import { h, s } from "../dom.js";
import { milliseconds } from "../format.js";

// Colours of styles/pages.css; stages of one kind share one.
const COLOURS = {
  authenticate: 4,
  admit: 4,
  route: 4,
  look_up: 3,
  screen: 5,
  tokenize: 2,
  generate: 1,
  queue: 6,
  prefill: 2,
  decode: 1,
  moderate: 5,
  settle: 6,
};
const MEANINGS = {
  authenticate: "who calls",
  admit: "limits and room",
  route: "which model",
  look_up: "response cache",
  screen: "check of the prompt",
  tokenize: "text to tokens",
  generate: "engine and tokenizer",
  queue: "wait for the first step",
  prefill: "prompt computed",
  decode: "answer computed",
  moderate: "check of the answer",
  settle: "usage counted",
};

const spanOf = (request) => Math.max(request.duration_ms, 1e-3, ...request.stages.map((stage) => stage.end_ms));

/** The stages by their beginnings. A request in flight that has been tokenized is being generated. */
function stagesOf(request) {
  const stages = [...request.stages].sort((a, b) => a.begin_ms - b.begin_ms);
  if (!request.in_flight || !stages.some((stage) => stage.name === "tokenize")) return stages;
  const begin = Math.max(...stages.map((stage) => stage.end_ms));
  return [...stages, { name: "generate", begin_ms: begin, end_ms: request.duration_ms, running: true }];
}

/** The same with what the engine did below the stage that waited for it. */
const rowsOf = (request) =>
  stagesOf(request).flatMap((stage) =>
    stage.name === "generate" ? [stage, ...request.engine_phases.map((phase) => ({ ...phase, inner: true }))] : [stage],
  );

const timeOf = ({ begin_ms: begin, end_ms: end }) => milliseconds(Math.max(0, end - begin));

const sentence = (request) =>
  `${stagesOf(request).map((stage) => `${stage.name.replace("_", " ")} ${timeOf(stage)}`).join(", ") || "No stage has ended"}; ${milliseconds(request.duration_ms)} in all`;

/** All stages on one line, for a row of the table. */
export function strip(request) {
  const total = spanOf(request);
  const width = 140;
  return s(
    "svg",
    { class: "strip", viewBox: `0 0 ${width} 12`, role: "img", "aria-label": sentence(request), preserveAspectRatio: "none" },
    s("rect", { class: "rest", x: 0, y: 4, width, height: 4, rx: 2 }),
    stagesOf(request)
      .filter((stage) => stage.name !== "moderate")
      .map((stage) =>
        s("rect", {
          class: `series-${COLOURS[stage.name]}${stage.running ? " running" : ""}`,
          x: ((stage.begin_ms / total) * width).toFixed(2),
          y: 1.5,
          width: Math.max(0.8, ((stage.end_ms - stage.begin_ms) / total) * width).toFixed(2),
          height: 9,
          rx: 1,
        }),
      ),
    request.first_text_ms === undefined ? null : s("rect", { class: "mark", x: ((request.first_text_ms / total) * width - 0.5).toFixed(2), y: 0, width: 1.2, height: 12 }),
  );
}

/** One line a stage, with its time, as a table that a screen reader reads. */
export function waterfall(request) {
  const total = spanOf(request);
  const bar = ({ name, begin_ms: begin, end_ms: end, running, inner }) => {
    const element = h("span", { class: `stage-bar series-${COLOURS[name]}${running ? " running" : ""}${inner ? " inner" : ""}` });
    element.style.left = `${(begin / total) * 100}%`;
    element.style.width = `${Math.max(0.3, ((end - begin) / total) * 100)}%`;
    return element;
  };
  const first = () => {
    if (request.first_text_ms === undefined) return null;
    const element = h("span", { class: "first-token" });
    element.style.left = `${(request.first_text_ms / total) * 100}%`;
    return element;
  };
  return h(
    "table",
    { class: "waterfall" },
    h("caption", { class: "unseen" }, `Stages of the request: ${sentence(request)}`),
    h("colgroup", {}, h("col", { class: "stage-name" }), h("col"), h("col", { class: "stage-time" })),
    h("thead", { class: "unseen" }, h("tr", {}, ["Stage", "Begin", "Time"].map((label) => h("th", { scope: "col" }, label)))),
    h(
      "tbody",
      {},
      rowsOf(request).map((stage) =>
        h(
          "tr",
          stage.inner ? { class: "inner" } : {},
          h("th", { scope: "row" }, stage.name.replace("_", " "), " ", h("span", { class: "muted meaning" }, MEANINGS[stage.name])),
          h("td", { class: "lane" }, h("span", { class: "unseen" }, `after ${milliseconds(stage.begin_ms)}`), bar(stage), first()),
          h("td", { class: "right" }, timeOf(stage)),
        ),
      ),
    ),
    request.first_text_ms === undefined
      ? null
      : h("tfoot", {}, h("tr", {}, h("td", { class: "muted small", colspan: 3 }, "The dashed line is the first token, ", milliseconds(request.first_text_ms), " after the arrival."))),
  );
}
