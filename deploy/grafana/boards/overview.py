"""How the mesh does as its callers see it."""

from __future__ import annotations

from grafana_foundation_sdk.builders import dashboard
from panels import (
    COUNT,
    HALF,
    PER_SECOND,
    RATE,
    SECONDS,
    SHARE,
    THIRD,
    TOKENS_PER_SECOND,
    Query,
    board,
    graph,
    laid_out,
    number,
    percentiles,
    rate,
)

MODEL = 'model=~"$model"'
CHOSEN = 'model=~"$model", tenant=~"$tenant"'


def overview() -> dashboard.Dashboard:
    """Traffic, failures, latencies, tokens and cost."""
    return laid_out(
        board(
            "overview",
            "MeshServe: Overview",
            "How the mesh does as its callers see it.",
            "model",
            "tenant",
        ),
        number(
            "Requests",
            Query(f"sum(rate(meshserve_gateway_requests_total{{{CHOSEN}}}[{RATE}]))"),
            "Inference requests that ended, however they did.",
            unit=PER_SECOND,
        ),
        number(
            "Failing",
            Query("meshserve:request_errors:ratio_rate5m"),
            "Share of all requests of five minutes that failed by the mesh's own fault.",
            unit=SHARE,
            limits=(0.001, 0.01),
        ),
        number(
            "First token (p95)",
            Query(f"max(model:meshserve_gateway_time_to_first_token_seconds:p95_5m{{{MODEL}}})"),
            "TTFT over five minutes, of the slowest model.",
            unit=SECONDS,
            limits=(1.0, 2.5),
        ),
        number(
            "Tokens out",
            Query(f"sum(rate(meshserve_gateway_completion_tokens_total{{{CHOSEN}}}[{RATE}]))"),
            "Completion tokens computed and sent. Counted as requests end.",
            unit=TOKENS_PER_SECOND,
        ),
        number(
            "In flight",
            Query("sum(meshserve_gateway_active_requests)"),
            "Requests in flight in all gateways.",
        ),
        number(
            "Cost",
            Query(
                f"sum by (currency) (increase(meshserve_gateway_cost_total{{{CHOSEN}}}[$__range]))",
                "{{currency}}",
            ),
            "What the answers of the time shown cost, where models have a price.",
            unit="none",
        ),
        dashboard.Row("Traffic"),
        graph(
            "Requests by model",
            rate("meshserve_gateway_requests_total", CHOSEN, "model"),
            "Inference requests that ended. Model `unknown`: refused before one was found.",
            unit=PER_SECOND,
            width=THIRD,
            stacked=True,
        ),
        graph(
            "Failures by reason",
            rate("meshserve_gateway_requests_total", f'{CHOSEN}, reason!=""', "reason"),
            "Requests that ended without an answer, callers' mistakes included.",
            unit=PER_SECOND,
            width=THIRD,
            stacked=True,
        ),
        graph(
            "Error budget burned",
            [
                Query(f"meshserve:request_errors:ratio_rate{window} / 0.001", window)
                for window in ("5m", "1h", "6h")
            ],
            "Failures by the mesh's own fault, over a level of 99.9 %: at 1 the budget of 30 "
            "days lasts for 30 days. Alerts begin at 6.",
            width=THIRD,
        ),
        dashboard.Row("Latency"),
        graph(
            "Time to first token",
            percentiles("meshserve_gateway_time_to_first_token_seconds", MODEL, exemplars=True),
            "TTFT: from the request's arrival to its first text. The dots are requests; each "
            "leads to its trace.",
            unit=SECONDS,
        ),
        graph(
            "Request duration",
            percentiles("meshserve_gateway_request_duration_seconds", MODEL, exemplars=True),
            "From arrival to end. The dots are requests; each leads to its trace.",
            unit=SECONDS,
        ),
        graph(
            "Time per output token",
            percentiles("meshserve_gateway_time_per_output_token_seconds", MODEL, exemplars=True),
            "TPOT: a request's time after its first token, by its tokens. The dots are "
            "requests; each leads to its trace.",
            unit=SECONDS,
        ),
        graph(
            "Inter-token latency",
            percentiles("meshserve_gateway_inter_token_latency_seconds", MODEL),
            "ITL as a reader of a stream sees it: time between two messages, each of one or "
            "more tokens. Counted as they are sent.",
            unit=SECONDS,
        ),
        graph(
            "Where the time goes (p95 of each stage)",
            percentiles("meshserve_gateway_stage_duration_seconds", "", by="stage", at=(0.95,)),
            "Duration of the stages of the request path. Some run side by side.",
            unit=SECONDS,
        ),
        graph(
            "Requests in flight",
            Query("sum by (instance) (meshserve_gateway_active_requests)", "{{instance}}"),
            "By gateway replica.",
            unit=COUNT,
            stacked=True,
        ),
        dashboard.Row("Tokens and cost"),
        graph(
            "Tokens",
            [
                Query(f"sum(rate(meshserve_gateway_{name}_total{{{CHOSEN}}}[{RATE}]))", legend)
                for name, legend in (
                    ("prompt_tokens", "in"),
                    ("cached_prompt_tokens", "in, from the prefix cache"),
                    ("completion_tokens", "out"),
                    ("cached_completion_tokens", "out, from the response cache"),
                )
            ],
            "Prompt tokens, those among them that an engine had in its prefix cache, "
            "completion tokens computed, and those replayed from the response cache.",
            unit=TOKENS_PER_SECOND,
            width=HALF,
        ),
        graph(
            "Cost per hour",
            Query(
                "3600 * sum by (model, currency) "
                f"(rate(meshserve_gateway_cost_total{{{CHOSEN}}}[{RATE}]))",
                "{{model}} ({{currency}})",
            ),
            "At the pace of the moment, by model, where models have a price.",
            unit="none",
            stacked=True,
        ),
    )
