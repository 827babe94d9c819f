// What a request asks for beside its messages. What is left empty is the model's own.

import { h } from "../dom.js";
import { forTab } from "../kept.js";

const KEPT = "meshserve.parameters";
export const DEFAULTS = {
  model: "",
  system: "",
  max_tokens: "256",
  temperature: "",
  top_p: "",
  top_k: "",
  min_p: "",
  repetition_penalty: "",
  seed: "",
  stop: "",
  json_schema: "",
  probabilities: true,
  cache: true,
};
const ALTERNATIVES = 5;

const NUMBERS = [
  ["max_tokens", "Max tokens", { min: 1, step: 1 }],
  ["temperature", "Temperature", { min: 0, max: 100, step: 0.1 }],
  ["top_p", "Top p", { min: 0.01, max: 1, step: 0.01 }],
  ["top_k", "Top k", { min: 0, step: 1 }],
  ["min_p", "Min p", { min: 0, max: 1, step: 0.01 }],
  ["repetition_penalty", "Repetition penalty", { min: 0.01, max: 10, step: 0.05 }],
  ["seed", "Seed", { min: 0, step: 1 }],
];

export function restored() {
  try {
    return { ...DEFAULTS, ...JSON.parse(forTab.get(KEPT)) };
  } catch {
    return { ...DEFAULTS };
  }
}

/** The form of the parameters, which it changes as they are. */
export function parametersForm(parameters, models) {
  const keep = () => forTab.set(KEPT, JSON.stringify(parameters));
  const field = (name, label, control) => {
    control.id = `parameter-${name}`;
    control.addEventListener("input", () => {
      parameters[name] = control.type === "checkbox" ? control.checked : control.value;
      keep();
    });
    return control.type === "checkbox"
      ? h("label", { class: "check" }, control, label)
      : h("div", {}, h("label", { for: control.id }, label), control);
  };
  const model = h(
    "select",
    {},
    models.map((each) => h("option", { value: each.name, selected: each.name === parameters.model }, each.name + (each.ready ? "" : " (not ready)"))),
  );
  parameters.model = model.value;
  return h(
    "form",
    { class: "parameters", onsubmit: (event) => event.preventDefault() },
    field("model", "Model", model),
    field("system", "System prompt", h("textarea", { rows: 3, placeholder: "None", value: parameters.system })),
    h(
      "div",
      { class: "pairs" },
      NUMBERS.map(([name, label, limits]) =>
        field(name, label, h("input", { type: "number", inputmode: "decimal", placeholder: "default", ...limits, value: parameters[name] })),
      ),
    ),
    field("stop", "Stop texts, one a line", h("textarea", { rows: 2, placeholder: "None", value: parameters.stop })),
    field("json_schema", "JSON schema of the answer", h("textarea", { rows: 2, placeholder: "None", value: parameters.json_schema })),
    field("probabilities", "Probabilities of tokens", h("input", { type: "checkbox", checked: parameters.probabilities })),
    field("cache", "Answer from the cache", h("input", { type: "checkbox", checked: parameters.cache })),
  );
}

const ROLES = { system: "ROLE_SYSTEM", user: "ROLE_USER", assistant: "ROLE_ASSISTANT" };
const SAMPLING = ["temperature", "top_p", "top_k", "min_p", "repetition_penalty", "seed"];

/** What one asks for, in plain names: the stem of the request and of the code that makes it. */
export function asked(parameters, messages) {
  const options = {};
  for (const name of ["max_tokens", ...SAMPLING]) {
    // A seed may be larger than what JavaScript counts exactly: its digits travel as they are.
    if (parameters[name] !== "") options[name] = name === "seed" ? parameters[name] : Number(parameters[name]);
  }
  const stop = parameters.stop.split("\n").filter((text) => text !== "");
  if (stop.length) options.stop = stop;
  if (parameters.json_schema.trim()) options.json_schema = parameters.json_schema;
  if (parameters.probabilities) options.logprobs = ALTERNATIVES;
  if (!parameters.cache) options.cache = false;
  const system = parameters.system.trim() ? [{ role: "system", content: parameters.system }] : [];
  return { model: parameters.model, messages: [...system, ...messages.map(({ role, content }) => ({ role, content }))], options };
}

/** A ChatRequest as JSON. */
export function chatRequest({ model, messages, options }) {
  const request = { model, conversation: { messages: messages.map(({ role, content }) => ({ role: ROLES[role], content })) } };
  const sampling = Object.fromEntries(SAMPLING.filter((name) => name in options).map((name) => [name, options[name]]));
  if (Object.keys(sampling).length) request.sampling = sampling;
  const stopping = {};
  if ("max_tokens" in options) stopping.max_tokens = options.max_tokens;
  if ("stop" in options) stopping.stop_strings = options.stop;
  if (Object.keys(stopping).length) request.stopping = stopping;
  if ("json_schema" in options) request.constraint = { json_schema: options.json_schema };
  if ("logprobs" in options) request.output = { logprobs: options.logprobs };
  if (options.cache === false) request.cache_control = { no_cache: true };
  return request;
}
