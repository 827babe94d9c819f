"""The table of all metrics, and the collectors that a service makes from its rows.

docs/telemetry.md is held against this table, and so is what the running mesh exposes. Labels have
few values: method names, gRPC codes, model names, tenants from the configuration, policy
categories; never anything that a caller makes up.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    disable_created_metrics,
    start_http_server,
)

# A second series per counter that says when it began; Prometheus knows by itself.
disable_created_metrics()  # type: ignore[no-untyped-call]

LATENCY_BUCKETS_S = (
    0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0
)  # fmt: skip
TOKEN_BUCKETS = (1, 4, 16, 64, 256, 1024, 4096, 16384, 65536, 262144)
BATCH_BUCKETS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512)

EVERY_SERVICE = "every service"


@dataclass(frozen=True, slots=True)
class MetricDeclaration:
    """One row: what a metric is called, what it counts, and who exposes it."""

    name: str
    kind: Literal["counter", "gauge", "histogram"]
    service: str
    meaning: str
    labels: tuple[str, ...] = ()
    buckets: tuple[float, ...] = LATENCY_BUCKETS_S


def _row(
    kind: Literal["counter", "gauge", "histogram"],
    service: str,
    name: str,
    meaning: str,
    *labels: str,
    buckets: tuple[float, ...] = LATENCY_BUCKETS_S,
) -> MetricDeclaration:
    return MetricDeclaration(name, kind, service, meaning, labels, buckets)


METRICS: tuple[MetricDeclaration, ...] = (
    _row("gauge", EVERY_SERVICE, "meshserve_build_info", "1, labelled with the version.", "version", "service"),
    _row("counter", EVERY_SERVICE, "meshserve_rpc_server_calls", "Calls answered.", "method", "code"),
    _row("histogram", EVERY_SERVICE, "meshserve_rpc_server_duration_seconds", "Duration of calls answered.", "method"),
    _row("gauge", EVERY_SERVICE, "meshserve_rpc_server_active_calls", "Calls being answered.", "method"),
    _row("counter", EVERY_SERVICE, "meshserve_rpc_client_calls", "Calls made to other services.", "method", "code"),
    _row("histogram", EVERY_SERVICE, "meshserve_rpc_client_duration_seconds", "Duration of calls made.", "method"),
    _row("gauge", EVERY_SERVICE, "meshserve_healthy", "1 while the service's own probe succeeds."),
    _row("counter", "gateway", "meshserve_gateway_requests", "Inference requests by how they ended; `reason` is empty for success.", "model", "tenant", "reason"),
    _row("histogram", "gateway", "meshserve_gateway_request_duration_seconds", "Duration of inference requests.", "model"),
    _row("histogram", "gateway", "meshserve_gateway_time_to_first_token_seconds", "Time from arrival to the first text sent.", "model"),
    _row("histogram", "gateway", "meshserve_gateway_time_per_output_token_seconds", "Time per completion token after the first.", "model"),
    _row("gauge", "gateway", "meshserve_gateway_active_requests", "Inference requests in flight."),
    _row("gauge", "gateway", "meshserve_gateway_requests_awaiting_engine", "Requests that wait for an engine of a model with `activation_timeout_s` to be started.", "model"),
    _row("counter", "gateway", "meshserve_gateway_prompt_tokens", "Prompt tokens of requests answered.", "model", "tenant"),
    _row("counter", "gateway", "meshserve_gateway_completion_tokens", "Completion tokens sent.", "model", "tenant"),
    _row("counter", "gateway", "meshserve_gateway_cached_responses", "Requests answered from the response cache.", "model"),
    _row("histogram", "gateway", "meshserve_gateway_stage_duration_seconds", "Duration of the stages of the request path.", "stage"),
    _row("counter", "tokenizer", "meshserve_tokenizer_encoded_tokens", "Tokens that texts were turned into.", "model"),
    _row("counter", "tokenizer", "meshserve_tokenizer_decoded_tokens", "Tokens that were turned into text.", "model"),
    _row("gauge", "tokenizer", "meshserve_tokenizer_decode_sessions", "Sequences being decoded."),
    _row("gauge", "engine", "meshserve_engine_running_sequences", "Sequences computed in the current step."),
    _row("gauge", "engine", "meshserve_engine_waiting_sequences", "Sequences waiting to be computed."),
    _row("gauge", "engine", "meshserve_engine_kv_blocks_used", "Blocks of the KV cache in use."),
    _row("gauge", "engine", "meshserve_engine_kv_blocks", "Blocks of the KV cache."),
    _row("counter", "engine", "meshserve_engine_steps", "Steps computed."),
    _row("histogram", "engine", "meshserve_engine_step_duration_seconds", "Duration of steps."),
    _row("histogram", "engine", "meshserve_engine_batch_tokens", "Tokens computed in a step.", buckets=BATCH_BUCKETS),
    _row("counter", "engine", "meshserve_engine_prompt_tokens", "Prompt tokens computed."),
    _row("counter", "engine", "meshserve_engine_generated_tokens", "Tokens generated."),
    _row("counter", "engine", "meshserve_engine_preemptions", "Sequences put back in the queue because the KV cache was full."),
    _row("counter", "engine", "meshserve_engine_cache_queried_tokens", "Tokens looked up in the prefix cache as their sequences entered."),
    _row("counter", "engine", "meshserve_engine_cache_hit_tokens", "Of these, tokens that were there and were not computed again."),
    _row("counter", "engine", "meshserve_engine_drafted_tokens", "Tokens guessed ahead (speculative decoding) and verified."),
    _row("counter", "engine", "meshserve_engine_accepted_draft_tokens", "Of these, tokens that were right."),
    _row("counter", "engine", "meshserve_engine_core_restarts", "Restarts of the core process."),
    _row("histogram", "engine", "meshserve_engine_queue_duration_seconds", "Time that requests waited before their first step."),
    _row("histogram", "engine", "meshserve_engine_prompt_length_tokens", "Prompt lengths of requests.", buckets=TOKEN_BUCKETS),
    _row("counter", "cache", "meshserve_cache_lookups", "Look-ups by outcome: hit, miss, pending, coalesced, error.", "outcome"),
    _row("counter", "cache", "meshserve_cache_stores", "Answers offered, by outcome: stored, rejected (too large), outdated (forgotten meanwhile), error.", "outcome"),
    _row("histogram", "cache", "meshserve_cache_backend_duration_seconds", "Duration of commands to the Redis-protocol server.", "command"),
    _row("counter", "safety", "meshserve_safety_checks", "Texts checked, by what was decided: allow, flag, redact, block.", "subject", "action"),
    _row("counter", "safety", "meshserve_safety_findings", "Findings by category of the policy.", "category", "action"),
    _row("gauge", "safety", "meshserve_safety_completion_sessions", "Completions being checked."),
)  # fmt: skip


class _Kept:
    """Finds the collector of some labels by one look-up; the library's own way makes new texts of
    the labels and takes a lock each time, at dozens of places in a request."""

    def labels(self, *values: str) -> Any:
        """The collector of these labels, in the order of their names."""
        kept: dict[tuple[str, ...], Any] = self.__dict__.setdefault("_kept", {})
        child = kept.get(values)
        if child is None:
            child = kept[values] = super().labels(*values)  # type: ignore[misc]
        return child


class _KeptCounter(_Kept, Counter):  # type: ignore[misc]
    pass


class _KeptGauge(_Kept, Gauge):  # type: ignore[misc]
    pass


class _KeptHistogram(_Kept, Histogram):  # type: ignore[misc]
    pass


class Metrics:
    """The collectors of one service, and the HTTP port that shows them."""

    def __init__(self, service: str) -> None:
        self.service = service
        self.registry = CollectorRegistry()
        self._collectors: dict[str, Counter | Gauge | Histogram] = {}
        for row in METRICS:
            if row.service in (EVERY_SERVICE, service):
                self._collectors[row.name] = self._make(row)

    def counter(self, name: str) -> Counter:
        """A declared counter; KeyError for a name that is not in the table."""
        collector = self._collectors[name]
        assert isinstance(collector, Counter), name
        return collector

    def gauge(self, name: str) -> Gauge:
        """A declared gauge; KeyError for a name that is not in the table."""
        collector = self._collectors[name]
        assert isinstance(collector, Gauge), name
        return collector

    def histogram(self, name: str) -> Histogram:
        """A declared histogram; KeyError for a name that is not in the table."""
        collector = self._collectors[name]
        assert isinstance(collector, Histogram), name
        return collector

    def serve(self, host: str, port: int) -> None:
        """Answers `GET /metrics` from a thread of its own. Raises OSError when the port is taken."""
        start_http_server(port, addr=host, registry=self.registry)

    def _make(self, row: MetricDeclaration) -> Counter | Gauge | Histogram:
        if row.kind == "counter":
            return _KeptCounter(row.name, row.meaning, row.labels, registry=self.registry)
        if row.kind == "gauge":
            return _KeptGauge(row.name, row.meaning, row.labels, registry=self.registry)
        return _KeptHistogram(
            row.name, row.meaning, row.labels, registry=self.registry, buckets=row.buckets
        )
