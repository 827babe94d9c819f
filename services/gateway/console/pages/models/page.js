// What is served, and what each tenant has used of it.

import { call, watch } from "../api.js";
import { h, replace } from "../dom.js";
import { compact, count, milliseconds, percent, rate, words } from "../format.js";
import { panel } from "../mesh/page.js";
import { notice, problem } from "../problem.js";

export function mount(main, session) {
  const cards = h("div", { class: "cards" });
  const spend = h("div");
  const trouble = h("div");
  let models = [];
  let mesh = null;
  replace(main, h("div", { class: "head" }, h("h1", {}, "Models")), trouble, cards, spend);

  function show() {
    replace(cards, models.map((model) => modelCard(model, (mesh?.models ?? []).find((each) => each.model === model.name))));
    if (mesh !== null) replace(spend, spendTable(mesh));
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
  } else replace(spend, notice("Use and limits are for operators", "This key may use the models above. A key with operator: true in gateway.auth.keys may see what everybody uses."));
  return () => stopping.abort();
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
        h("span", { class: `badge ${model.ready ? "good" : "bad"}` }, model.ready ? "ready" : "not ready"),
      ),
    ),
    model.aliases?.length ? h("p", { class: "muted small" }, "Also called ", model.aliases.join(", ")) : null,
    h(
      "dl",
      { class: "facts-list" },
      fact("Parameters", model.parameters ? compact(model.parameters) : "–"),
      fact("Precision", model.dtype || "–"),
      fact("Context", model.context_tokens ? `${count(model.context_tokens)} tokens` : "–"),
      fact("Vocabulary", model.vocabulary_size ? count(model.vocabulary_size) : "–"),
      fact("Architecture", model.architecture || "–"),
      fact("Can", can.join(", ") || "–"),
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

const money = (value, currency) => new Intl.NumberFormat("en-GB", { style: "currency", currency, currencyDisplay: "narrowSymbol", maximumSignificantDigits: 4 }).format(value);

function spendTable(mesh) {
  const tenants = mesh.tenants ?? [];
  const costs = tenants.some((tenant) => tenant.cost_total !== undefined);
  const tokensOf = (tenant) => Number(tenant.prompt_tokens_total ?? 0) + Number(tenant.completion_tokens_total ?? 0);
  const all = Math.max(1, tenants.reduce((sum, tenant) => sum + tokensOf(tenant), 0));
  return panel(
    "Limits and spend",
    [
      "Tenant",
      ["Requests", "right"],
      ["Limit", "right"],
      ["Failed", "right wide-only"],
      ["Prompt tokens", "right wide-only"],
      ["Answer tokens", "right"],
      ["Share of tokens", "wide-only"],
      ...(costs ? [["Cost", "right"]] : []),
    ],
    tenants.map((tenant) => {
      const fill = h("span");
      fill.style.width = `${(tokensOf(tenant) / all) * 100}%`;
      return [
        h("strong", {}, tenant.tenant),
        [count(tenant.requests_total), h("div", { class: "muted small" }, `${rate(tenant.requests_per_second)}/s now`)],
        tenant.requests_per_minute_limit === undefined ? "none" : `${count(tenant.requests_per_minute_limit)}/min`,
        count((tenant.errors ?? []).reduce((sum, error) => sum + Number(error.total ?? 0), 0)),
        count(tenant.prompt_tokens_total),
        count(tenant.completion_tokens_total),
        [h("span", { class: "meter" }, fill), percent(tokensOf(tenant) / all)],
        ...(costs ? [tenant.cost_total === undefined ? "–" : money(tenant.cost_total, mesh.currency)] : []),
      ];
    }),
    "No tenant has sent a request yet.",
  );
}
