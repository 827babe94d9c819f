"""Who asks, what for, and what it costs."""

from __future__ import annotations

from grafana_foundation_sdk.builders import dashboard
from panels import (
    PER_SECOND,
    RATE,
    SHARE,
    TOKENS_PER_SECOND,
    WHOLE,
    Query,
    board,
    graph,
    laid_out,
    rate,
    rows,
    share,
)

CHOSEN = 'model=~"$model", tenant=~"$tenant"'


def tenants() -> dashboard.Dashboard:
    """Requests, tokens and spend of each tenant."""
    made = board(
        "tenants",
        "MeshServe: Tenants",
        "Who asks, what for, and what it costs.",
        "model",
        "tenant",
    )
    return laid_out(
        made,
        graph(
            "Requests by tenant",
            rate("meshserve_gateway_requests_total", CHOSEN, "tenant"),
            "Inference requests that ended.",
            unit=PER_SECOND,
            stacked=True,
        ),
        graph(
            "Requests by tenant and outcome",
            rate(
                "meshserve_gateway_requests_total",
                f'{CHOSEN}, reason!=""',
                "tenant, reason",
                "{{tenant}} {{reason}}",
            ),
            "Requests that ended without an answer; RATE_LIMITED among them.",
            unit=PER_SECOND,
            stacked=True,
        ),
        graph(
            "Tokens by tenant",
            [
                rate(
                    f"meshserve_gateway_{name}_tokens_total",
                    CHOSEN,
                    "tenant",
                    f"{{{{tenant}}}} {way}",
                )
                for name, way in (("prompt", "in"), ("completion", "out"))
            ],
            "Tokens of prompts, and of completions that were computed.",
            unit=TOKENS_PER_SECOND,
        ),
        graph(
            "Served from a cache",
            [
                share(
                    "meshserve_gateway_cached_prompt_tokens_total",
                    "meshserve_gateway_prompt_tokens_total",
                    CHOSEN,
                    "tenant",
                    "{{tenant}} prompt tokens",
                ),
                share(
                    "meshserve_gateway_cached_responses_total",
                    "meshserve_gateway_requests_total",
                    CHOSEN,
                    "tenant",
                    "{{tenant}} answers",
                    whole_matchers=f'{CHOSEN}, reason=""',
                ),
            ],
            "Share of prompt tokens from the prefix cache, and of answers from the response cache.",
            unit=SHARE,
            most=1,
        ),
        graph(
            "Cost per hour",
            Query(
                "3600 * sum by (tenant, currency) "
                f"(rate(meshserve_gateway_cost_total{{{CHOSEN}}}[{RATE}]))",
                "{{tenant}} ({{currency}})",
            ),
            "At the pace of the moment, where models have a price.",
            unit="none",
            width=WHOLE,
            stacked=True,
        ),
        rows(
            "Spent in the time shown",
            Query(
                "sum by (tenant, model, currency) "
                f"(increase(meshserve_gateway_cost_total{{{CHOSEN}}}[$__range]))"
            ),
            "By tenant and model.",
            unit="none",
        ),
        rows(
            "Tokens in the time shown",
            Query(
                "sum by (tenant, model) "
                f"(increase(meshserve_gateway_completion_tokens_total{{{CHOSEN}}}[$__range]))"
            ),
            "Completion tokens that were computed, by tenant and model.",
        ),
    )
