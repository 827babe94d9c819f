// What is served, and for operators how it does.

import { call, watch } from "../api.js";
import { h, replace } from "../dom.js";
import { compact, count, milliseconds, percent, rate, words } from "../format.js";
import { problem } from "../problem.js";

export function mount(main, session) {
  const cards = h("div", { class: "cards" });
  const trouble = h("div");
  let models = [];
  let mesh = null;
  replace(main, h("div", { class: "head" }, h("h1", {}, "Models")), trouble, cards);

  function show() {
    replace(cards, models.map((model) => modelCard(model, (mesh?.models ?? []).find((each) => each.model === model.name))));
  }

  async function load() {
    try {
      ({ models = [] } = await call("/api/models"));
      replace(trouble);
      show();
    } catch (error) {
      replace(trouble, problem(error, { retry: load }));
    }
  }

  load();
  const stopping = new AbortController();
  if (session.operator) {
    watch("/api/mesh", {
      signal: stopping.signal,
      onDocument: (document) => {
        mesh = document.mesh;
        show();
      },
      onProblem: (error) => replace(trouble, error ? problem(error) : null),
    });
  }
  return () => stopping.abort();
}

function stateOf(model) {
  const state = model.state ? words(model.state.replace("MODEL_STATE_", "")).toLowerCase() : "";
  if (state && state !== "unspecified") return state;
  return model.ready ? "ready" : "not ready";
}

function modelCard(model, live) {
  const fact = (term, value) => h("div", {}, h("dt", {}, term), h("dd", { class: "number" }, value));
  const can = (model.capabilities ?? []).map((name) => words(name.replace("MODEL_CAPABILITY_", "")).toLowerCase());
  return h(
    "article",
    { class: "card model-card", "aria-label": model.name },
    h(
      "div",
      { class: "head" },
      h("h2", {}, model.name),
      h(
        "span",
        { class: "actions" },
        model.is_default ? h("span", { class: "badge" }, "default") : null,
        h("span", { class: `badge ${model.ready ? "good" : "bad"}` }, stateOf(model)),
      ),
    ),
    model.aliases?.length ? h("p", { class: "muted small" }, "Also called ", model.aliases.join(", ")) : null,
    model.adapters?.length ? h("p", { class: "muted small" }, "Adapters: ", model.adapters.join(", ")) : null,
    h(
      "dl",
      { class: "facts-list" },
      fact("Parameters", model.parameters ? compact(model.parameters) : "–"),
      fact("Precision", model.dtype || "–"),
      fact("Context", model.context_tokens ? `${count(model.context_tokens)} tokens` : "–"),
      fact("Vocabulary", model.vocabulary_size ? count(model.vocabulary_size) : "–"),
      fact("Architecture", model.architecture || "–"),
      fact("Can", can.join(", ") || "–"),
      model.embedding_size ? fact("Vectors", `${count(model.embedding_size)} components`) : null,
      model.labels?.length ? fact("Classes", count(model.labels.length)) : null,
      live
        ? [
            fact("Engines", `${live.serving_engines ?? 0} of ${live.engines ?? 0} serving`),
            fact("Sequences", `${live.running_sequences ?? 0} running, ${live.waiting_sequences ?? 0} waiting`),
            fact("KV cache", percent(live.kv_use_ratio)),
            fact("Now", `${rate(live.completion_tokens_per_second)} tokens/s`),
            fact("First token, p50", milliseconds(live.time_to_first_token?.p50_ms)),
            fact("Requests", count(live.requests_total)),
          ]
        : null,
    ),
  );
}
