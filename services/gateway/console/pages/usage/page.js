// What the caller may use and has used; for operators what every tenant has.

import { watch } from "../api.js";
import { h, replace } from "../dom.js";
import { compact, count, duration, money, percent, rate } from "../format.js";
import { missingView } from "../gateways.js";
import { panel } from "../panel.js";
import { problem } from "../problem.js";

const TOTALS = ["requests", "failed_requests", "cached_responses", "prompt_tokens", "cached_prompt_tokens", "completion_tokens"];

export function mount(main, session) {
  const trouble = h("div");
  const missing = missingView();
  const limits = h("div");
  const figures = h("div", { class: "figures" });
  const models = h("div");
  const tenants = h("div");
  const since = h("span", { class: "muted small" });
  replace(main, h("div", { class: "head" }, h("h1", {}, "Usage"), since), trouble, missing.element, figures, limits, models, tenants);
  const onProblem = (error) => replace(trouble, error ? problem(error) : null);

  const stopping = new AbortController();
  watch("/api/usage", {
    signal: stopping.signal,
    onDocument: ({ gateways }) => {
      missing.update(gateways);
      const known = gateways.filter((gateway) => !gateway.problem);
      const [own] = known;
      const used = summed(known);
      const all = totalOf(used);
      const began = Math.min(...known.map((gateway) => Date.parse(gateway.start_time)));
      since.textContent = `${own.tenant}, since ${new Date(began).toLocaleString("en-GB", { dateStyle: "medium", timeStyle: "short" })}`;
      since.title = "What was used before a gateway was started is in the metrics alone";
      replace(
        figures,
        figure("Requests", count(all.requests), `${count(all.failed_requests)} failed`),
        figure("Prompt tokens", compact(all.prompt_tokens), `${count(all.cached_prompt_tokens)} reused`),
        figure("Answer tokens", compact(all.completion_tokens), `${count(all.cached_responses)} answers cached`),
        all.cost === undefined ? null : figure("Cost", money(all.cost, own.currency), "answers from the cache are free"),
        figure("In flight", count(known.reduce((sum, gateway) => sum + gateway.active_requests, 0)), `a gateway takes ${count(own.max_active_requests)}`),
      );
      replace(limits, limitView(own.allowance));
      renew(models, () => modelTable(used, own.currency));
    },
    onProblem,
  });
  if (session.operator) {
    watch("/api/mesh", { signal: stopping.signal, onDocument: ({ mesh }) => renew(tenants, () => tenantTable(mesh)), onProblem });
  }
  return () => stopping.abort();
}

/** Shows another table, unless the one that is there is being read with the keys. */
const renew = (holder, table) => holder.contains(document.activeElement) || replace(holder, table());

/** What all gateways have counted, by model. */
function summed(gateways) {
  const used = new Map();
  for (const { models } of gateways) {
    for (const { model, cost, ...counts } of models) {
      const sum = used.get(model) ?? { model, ...Object.fromEntries(TOTALS.map((name) => [name, 0])) };
      for (const name of TOTALS) sum[name] += Number(counts[name]);
      if (cost !== undefined) sum.cost = (sum.cost ?? 0) + cost;
      used.set(model, sum);
    }
  }
  return [...used.values()].sort((a, b) => b.completion_tokens - a.completion_tokens);
}

function totalOf(used) {
  const total = Object.fromEntries(TOTALS.map((name) => [name, used.reduce((sum, each) => sum + each[name], 0)]));
  const costs = used.filter((each) => each.cost !== undefined);
  return costs.length ? { ...total, cost: costs.reduce((sum, each) => sum + each.cost, 0) } : total;
}

const figure = (label, value, note) => h("div", { class: "figure plain card" }, h("div", { class: "muted small" }, label), h("div", { class: "value" }, value), h("div", { class: "muted small" }, note));

/** What is left of the limit, and when it is whole again. */
function limitView(allowance) {
  if (!allowance) return h("p", { class: "card limit" }, h("strong", {}, "No rate limit"), h("span", { class: "muted" }, "You may send requests as often as you like."));
  const { requests_per_minute: perMinute, burst, remaining, full_after_ms: fullAfter } = allowance;
  const rule = `${count(perMinute)} requests a minute, up to ${count(burst)} of them at once`;
  if (remaining === undefined) return h("p", { class: "card limit" }, h("strong", {}, rule), h("span", { class: "muted" }, "What is left of it cannot be read: Valkey does not answer."));
  const left = h("span");
  left.style.width = `${(remaining / burst) * 100}%`;
  return h(
    "div",
    { class: "card limit" },
    h("strong", {}, rule),
    h("span", { class: `meter wide${remaining === 0 ? " empty" : ""}`, role: "meter", "aria-label": "Requests that may come at once now", "aria-valuemin": 0, "aria-valuemax": burst, "aria-valuenow": remaining }, left),
    h("span", { class: "muted number" }, `${count(remaining)} left now${remaining < burst ? `; all ${count(burst)} again in ${duration(Math.max(1, Math.ceil(fullAfter / 1000)))}` : ""}`),
  );
}

function modelTable(used, currency) {
  const hasCost = used.some((each) => each.cost !== undefined);
  return panel(
    "By model",
    ["Model", ["Requests", "right"], ["Failed", "right wide-only"], ["From cache", "right wide-only"], ["Prompt tokens", "right"], ["Answer tokens", "right"], ...(hasCost ? [["Cost", "right"]] : [])],
    used.map((each) => [
      h("strong", {}, each.model === "unknown" ? "not routed" : each.model),
      count(each.requests),
      count(each.failed_requests),
      count(each.cached_responses),
      count(each.prompt_tokens),
      count(each.completion_tokens),
      ...(hasCost ? [each.cost === undefined ? "–" : money(each.cost, currency)] : []),
    ]),
    "No request has been sent yet.",
  );
}

function tenantTable(mesh) {
  const tenants = mesh.tenants ?? [];
  const costs = tenants.some((tenant) => tenant.cost_total !== undefined);
  const tokensOf = (tenant) => Number(tenant.prompt_tokens_total ?? 0) + Number(tenant.completion_tokens_total ?? 0);
  const all = Math.max(1, tenants.reduce((sum, tenant) => sum + tokensOf(tenant), 0));
  return panel(
    "All tenants",
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
