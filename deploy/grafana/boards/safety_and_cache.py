"""What is let in and out, and what need not be computed twice."""

from __future__ import annotations

from grafana_foundation_sdk.builders import dashboard
from panels import (
    PER_SECOND,
    SECONDS,
    SHARE,
    THIRD,
    TOKENS_PER_SECOND,
    Panels,
    board,
    graph,
    laid_out,
    percentiles,
    present,
    rate,
    share,
)


def safety_and_cache() -> dashboard.Dashboard:
    """Verdicts, denials, look-ups."""
    made = board(
        "safety-and-cache",
        "MeshServe: Safety and cache",
        "What is let in and out, and what need not be computed twice.",
        "model",
    )
    return laid_out(
        made,
        dashboard.Row("Safety"),
        *_safety(),
        dashboard.Row("Response cache"),
        *_cache(),
    )


def _safety() -> Panels:
    return (
        graph(
            "Verdicts",
            rate(
                "meshserve_safety_checks_total",
                "",
                "subject, action",
                "{{subject}} {{action}}",
            ),
            "Texts checked, by what was decided.",
            unit=PER_SECOND,
            width=THIRD,
            stacked=True,
        ),
        graph(
            "Findings",
            rate(
                "meshserve_safety_findings_total",
                "",
                "category, action",
                "{{category}} {{action}}",
            ),
            "By category of the policy.",
            unit=PER_SECOND,
            width=THIRD,
            stacked=True,
        ),
        graph(
            "Denials by reason",
            rate("meshserve_gateway_denials_total", "", "reason"),
            "Calls denied for who makes them: keys, permissions, rate limits.",
            unit=PER_SECOND,
            width=THIRD,
            stacked=True,
        ),
        graph(
            "Time for a check (p95)",
            percentiles(
                "meshserve_rpc_client_duration_seconds",
                'method=~"meshserve.v1.SafetyService/CheckPrompt"',
                by="method",
                at=(0.5, 0.95),
            ),
            "Prompt checks, as the gateway sees them.",
            unit=SECONDS,
            width=THIRD,
        ),
        graph(
            "Completions being checked",
            present("meshserve_safety_completion_sessions", "", "instance"),
            "By replica of the filter.",
            width=THIRD,
            stacked=True,
        ),
        graph(
            "Passed unchecked",
            rate("meshserve_gateway_unchecked_requests_total", 'model=~"$model"', "model"),
            "Requests whose text passed while the filter was away.",
            unit=PER_SECOND,
            width=THIRD,
        ),
    )


def _cache() -> Panels:
    return (
        graph(
            "Answered from the cache",
            share(
                "meshserve_gateway_cached_responses_total",
                "meshserve_gateway_requests_total",
                'model=~"$model"',
                "model",
                whole_matchers='model=~"$model", reason=""',
            ),
            "Share of the answers, those included that are never looked up since they are not "
            "deterministic.",
            unit=SHARE,
            width=THIRD,
            most=1,
        ),
        graph(
            "Look-ups",
            rate("meshserve_cache_lookups_total", "", "outcome"),
            "By outcome. Coalesced: waited for an equal request and got its answer.",
            unit=PER_SECOND,
            width=THIRD,
            stacked=True,
        ),
        graph(
            "Answers offered",
            rate("meshserve_cache_stores_total", "", "outcome"),
            "By what became of them.",
            unit=PER_SECOND,
            width=THIRD,
            stacked=True,
        ),
        graph(
            "Tokens that were not computed",
            rate(
                "meshserve_gateway_cached_completion_tokens_total",
                'model=~"$model"',
                "model",
            ),
            "Completion tokens replayed from the cache.",
            unit=TOKENS_PER_SECOND,
        ),
        graph(
            "Backend (p95)",
            percentiles("meshserve_cache_backend_duration_seconds", "", by="command", at=(0.95,)),
            "Duration of commands to the Redis-protocol server.",
            unit=SECONDS,
        ),
    )
