"""What the gateways answer, by model and by tenant too, and what cache and filter find."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from meshserve.v1 import engine_pb2, mesh_pb2
from services.gateway.overview.rates import Histogram, merged, ratio
from services.gateway.overview.readings import Labels, Wanted, Window, both, everything, having
from services.gateway.overview.replicas import Replica, latency, windows
from services.runtime.reasons import Reason
from services.runtime.settings import Settings

_REQUESTS = "meshserve_gateway_requests"
_PROMPT_TOKENS = "meshserve_gateway_prompt_tokens"
_COMPLETION_TOKENS = "meshserve_gateway_completion_tokens"
_CACHED_RESPONSES = "meshserve_gateway_cached_responses"
_COST = "meshserve_gateway_cost"
_SECONDS_PER_HOUR = 3600
# By the metric's label; of several, the first is told.
_STATES = {
    "ready": engine_pb2.MODEL_STATE_READY,
    "sleeping": engine_pb2.MODEL_STATE_SLEEPING,
    "loading": engine_pb2.MODEL_STATE_LOADING,
    "draining": engine_pb2.MODEL_STATE_DRAINING,
    "failed": engine_pb2.MODEL_STATE_FAILED,
    "unloaded": engine_pb2.MODEL_STATE_UNLOADED,
}
# Look-ups that spare the engine its work.
_HITS = frozenset({"hit", "coalesced"})


class Sums:
    """Metrics summed over the replicas of a service."""

    def __init__(self, windows: Sequence[Window]) -> None:
        self._windows = windows

    def total(self, name: str, wanted: Wanted = everything) -> float:
        """Counters since start, gauges as they are."""
        return sum(window.total(name, wanted) for window in self._windows)

    def rate(self, name: str, wanted: Wanted = everything) -> float:
        """Counters, per second."""
        return sum(window.rate(name, wanted) for window in self._windows)

    def observed(self, name: str, wanted: Wanted = everything) -> Histogram | None:
        """Histograms over the window."""
        found = [window.observed(name, wanted) for window in self._windows]
        return merged(each for each in found if each is not None)

    def latency(self, name: str, wanted: Wanted = everything) -> mesh_pb2.LatencyOverview | None:
        """Histograms of seconds over the window, as the picture has them."""
        return latency(self.observed(name, wanted))

    def values(self, name: str, label: str) -> list[str]:
        """The values that a label of a metric has, in the order of their first use."""
        return list(
            dict.fromkeys(
                labels[label]
                for window in self._windows
                for labels, _ in window.last.series(name)
                if label in labels
            )
        )

    def named_rates(
        self, name: str, label: str, wanted: Wanted = everything
    ) -> list[mesh_pb2.NamedRate]:
        """A counter by the values of a label, the most frequent first; what never happened is left
        out."""
        rates = []
        for value in self.values(name, label):
            of_value = both(having(label, value), wanted)
            total = round(self.total(name, of_value))
            if total:
                rate = self.rate(name, of_value)
                rates.append(mesh_pb2.NamedRate(name=value, per_second=rate, total=total))
        return sorted(rates, key=lambda each: (-each.per_second, -each.total, each.name))


def traffic_overview(replicas: Sequence[Replica], settings: Settings) -> mesh_pb2.TrafficOverview:
    """What all gateways answer."""
    gateways = Sums(windows(replicas, "gateway"))
    has_prices = _has_prices(settings)
    return mesh_pb2.TrafficOverview(
        **_counts(gateways, everything),
        active_requests=round(gateways.total("meshserve_gateway_active_requests")),
        error_ratio=_error_ratio(gateways, everything),
        errors=gateways.named_rates(_REQUESTS, "reason", _is_failure),
        denials=gateways.named_rates("meshserve_gateway_denials", "reason"),
        time_to_first_token=gateways.latency("meshserve_gateway_time_to_first_token_seconds"),
        time_per_output_token=gateways.latency("meshserve_gateway_time_per_output_token_seconds"),
        inter_token_latency=gateways.latency("meshserve_gateway_inter_token_latency_seconds"),
        duration=gateways.latency("meshserve_gateway_request_duration_seconds"),
        cached_responses_per_second=gateways.rate(_CACHED_RESPONSES),
        cached_responses_total=round(gateways.total(_CACHED_RESPONSES)),
        stages=_stages(gateways),
        cost_per_hour=gateways.rate(_COST) * _SECONDS_PER_HOUR if has_prices else None,
        cost_total=gateways.total(_COST) if has_prices else None,
    )


def model_overviews(
    replicas: Sequence[Replica], settings: Settings
) -> list[mesh_pb2.ModelOverview]:
    """Every model of the settings."""
    gateways = Sums(windows(replicas, "gateway"))
    engines = [replica for replica in replicas if replica.service == "engine"]
    return [
        _model(name, gateways, [each for each in engines if each.runs(name)], settings)
        for name in settings.models
    ]


def tenant_overviews(
    replicas: Sequence[Replica], settings: Settings
) -> list[mesh_pb2.TenantOverview]:
    """Tenants that have a key or have sent a request."""
    gateways = Sums(windows(replicas, "gateway"))
    names = {key.name for key in settings.gateway.auth.keys}
    names.update(gateways.values(_REQUESTS, "tenant"))
    return [_tenant(name, gateways, settings) for name in sorted(names)]


def cache_overview(replicas: Sequence[Replica]) -> mesh_pb2.ResponseCacheOverview:
    """The response cache over its replicas."""
    caches = Sums(windows(replicas, "cache"))
    name = "meshserve_cache_lookups"
    # Whoever waits for another's answer looks twice: the first look says `pending`.
    rate = caches.rate(name, lambda labels: labels.get("outcome") != "pending")
    return mesh_pb2.ResponseCacheOverview(
        lookups_per_second=rate,
        hit_ratio=ratio(caches.rate(name, lambda labels: labels.get("outcome") in _HITS), rate),
        lookups=caches.named_rates(name, "outcome"),
        stores=caches.named_rates("meshserve_cache_stores", "outcome"),
    )


def safety_overview(replicas: Sequence[Replica]) -> mesh_pb2.SafetyOverview:
    """The safety filter over its replicas."""
    filters = Sums(windows(replicas, "safety"))
    return mesh_pb2.SafetyOverview(
        checks_per_second=filters.rate("meshserve_safety_checks"),
        actions=filters.named_rates("meshserve_safety_checks", "action"),
        findings=filters.named_rates("meshserve_safety_findings", "category"),
    )


def _model(
    name: str, gateways: Sums, engines: Sequence[Replica], settings: Settings
) -> mesh_pb2.ModelOverview:
    own = having("model", name)
    answering = Sums(windows(engines, "engine"))
    serving = sum(each.serves(name) for each in engines)
    states = {each.hosted.get(name, "") for each in engines}
    has_price = settings.models[name].price is not None
    return mesh_pb2.ModelOverview(
        model=name,
        **_counts(gateways, own),
        ready=serving > 0,
        error_ratio=_error_ratio(gateways, own),
        time_to_first_token=gateways.latency("meshserve_gateway_time_to_first_token_seconds", own),
        time_per_output_token=gateways.latency(
            "meshserve_gateway_time_per_output_token_seconds", own
        ),
        serving_engines=serving,
        engines=len(engines),
        state=next(
            (value for label, value in _STATES.items() if label in states),
            engine_pb2.MODEL_STATE_UNSPECIFIED,
        ),
        running_sequences=round(answering.total("meshserve_engine_running_sequences", own)),
        waiting_sequences=round(answering.total("meshserve_engine_waiting_sequences", own)),
        kv_use_ratio=ratio(
            answering.total("meshserve_engine_kv_blocks_used", own),
            answering.total("meshserve_engine_kv_blocks", own),
        ),
        cost_total=gateways.total(_COST, own) if has_price else None,
        requests_awaiting_engine=round(
            gateways.total("meshserve_gateway_requests_awaiting_engine", own)
        ),
    )


def _tenant(name: str, gateways: Sums, settings: Settings) -> mesh_pb2.TenantOverview:
    own = having("tenant", name)
    return mesh_pb2.TenantOverview(
        tenant=name,
        **_counts(gateways, own),
        errors=gateways.named_rates(_REQUESTS, "reason", both(own, _is_failure)),
        requests_per_minute_limit=_limit(name, settings),
        cost_total=gateways.total(_COST, own) if _has_prices(settings) else None,
    )


def _counts(gateways: Sums, wanted: Wanted) -> dict[str, Any]:
    """Requests and tokens, which the picture has of all traffic, of a model and of a tenant."""
    return {
        "requests_per_second": gateways.rate(_REQUESTS, wanted),
        "requests_total": round(gateways.total(_REQUESTS, wanted)),
        "prompt_tokens_per_second": gateways.rate(_PROMPT_TOKENS, wanted),
        "prompt_tokens_total": round(gateways.total(_PROMPT_TOKENS, wanted)),
        "completion_tokens_per_second": gateways.rate(_COMPLETION_TOKENS, wanted),
        "completion_tokens_total": round(gateways.total(_COMPLETION_TOKENS, wanted)),
    }


def _limit(tenant: str, settings: Settings) -> int | None:
    """The requests per minute that a tenant may send; each of its keys may have its own limit."""
    general = settings.gateway.rate_limit.requests_per_minute
    limits = [
        key.requests_per_minute or general
        for key in settings.gateway.auth.keys
        if key.name == tenant
    ] or [general]
    known = [limit for limit in limits if limit is not None]
    return max(known) if len(known) == len(limits) else None


def _stages(gateways: Sums) -> list[mesh_pb2.StageOverview]:
    name = "meshserve_gateway_stage_duration_seconds"
    return [
        mesh_pb2.StageOverview(
            stage=stage,
            latency=gateways.latency(name, having("stage", stage)),
        )
        for stage in gateways.values(name, "stage")
    ]


def _error_ratio(gateways: Sums, wanted: Wanted) -> float | None:
    """The share that failed, of the requests whose caller did not leave."""

    stayed = both(wanted, lambda labels: labels.get("reason") != Reason.CANCELLED)
    failed = gateways.rate(_REQUESTS, both(wanted, _is_failure))
    return ratio(failed, gateways.rate(_REQUESTS, stayed))


def _is_failure(labels: Labels) -> bool:
    # A caller may change its mind; that is no failure.
    return labels.get("reason", "") not in ("", Reason.CANCELLED)


def _has_prices(settings: Settings) -> bool:
    return any(model.price is not None for model in settings.models.values())
