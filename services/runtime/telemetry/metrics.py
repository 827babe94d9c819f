"""The table of all metrics, and the collectors that a service makes from its rows.

docs/telemetry.md is held against this table, and so is what the running mesh exposes. Labels have
few values: method names, gRPC codes, model names, tenants from the configuration, policy
categories; never anything that a caller makes up.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Literal

from opentelemetry import trace
from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    disable_created_metrics,
    start_http_server,
)
from prometheus_client.metrics_core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.registry import Collector

from services.runtime.telemetry.distributions import Distributions
from services.runtime.telemetry.processes import process_readings

# A second series per counter that says when it began; Prometheus knows by itself.
disable_created_metrics()  # type: ignore[no-untyped-call]

LATENCY_BUCKETS_S = (
    0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0
)  # fmt: skip
# Where the semantic conventions 1.41.1 advise bounds for a histogram of ours (gen_ai.server.*,
# gen_ai.client.token.usage), these are theirs, with more below for small models and cached answers,
# and more above for long prompts on a CPU.
REQUEST_BUCKETS_S = (
    0.005, 0.01, 0.02, 0.04, 0.08, 0.16, 0.32, 0.64, 1.28, 2.56, 5.12, 10.24, 20.48, 40.96, 81.92,
    163.84, 327.68,
)  # fmt: skip
FIRST_TOKEN_BUCKETS_S = (
    0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0,
    20.0, 40.0, 80.0,
)  # fmt: skip
TOKEN_INTERVAL_BUCKETS_S = (
    0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0, 2.5,
    5.0, 10.0,
)  # fmt: skip
TOKEN_BUCKETS = (1, 4, 16, 64, 256, 1024, 4096, 16384, 65536, 262144)
SEQUENCE_BUCKETS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512)
BATCH_BUCKETS = (*SEQUENCE_BUCKETS, 1024, 2048, 4096, 8192, 16384)

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
    # Its values are asked for when it is scraped; see `Metrics.read`.
    read: bool = False
    # A histogram that one thread observes all the time; see distributions.py.
    frequent: bool = False


def _row(
    kind: Literal["counter", "gauge", "histogram"],
    service: str,
    name: str,
    meaning: str,
    *labels: str,
    buckets: tuple[float, ...] = LATENCY_BUCKETS_S,
    read: bool = False,
    frequent: bool = False,
) -> MetricDeclaration:
    return MetricDeclaration(name, kind, service, meaning, labels, buckets, read, frequent)


METRICS: tuple[MetricDeclaration, ...] = (
    _row("gauge", EVERY_SERVICE, "meshserve_build_info", "1, labelled with the version.", "version", "service"),
    _row("gauge", EVERY_SERVICE, "meshserve_healthy", "1 while the service's own probe succeeds."),
    _row("counter", EVERY_SERVICE, "meshserve_process_cpu_seconds", "Processor time used, of all threads, in user and system mode. `process` is `main`, or `core` for the process that computes in an engine; `core MODEL` where an engine hosts several.", "process", read=True),
    _row("gauge", EVERY_SERVICE, "meshserve_process_resident_memory_bytes", "Memory held (resident set).", "process", read=True),
    _row("gauge", EVERY_SERVICE, "meshserve_process_threads", "Threads.", "process", read=True),
    _row("gauge", EVERY_SERVICE, "meshserve_process_open_fds", "Files and sockets open.", "process", read=True),
    _row("gauge", EVERY_SERVICE, "meshserve_process_start_time_seconds", "When the process started, in seconds since 1970.", "process", read=True),
    _row("counter", EVERY_SERVICE, "meshserve_file_reloads", "Changes of files that are read again while a service runs, by outcome: taken, refused (what was in use before stays so). `what` is what they hold: api_keys, certificate, policies, trust_SERVICE, valkey.", "what", "outcome"),
    _row("gauge", EVERY_SERVICE, "meshserve_files_refused", "1 while files that are read again hold what cannot be used.", "what"),
    _row("gauge", EVERY_SERVICE, "meshserve_certificate_expiry_seconds", "When the certificate that is served expires, in seconds since 1970. Absent without TLS.", read=True),
    _row("counter", EVERY_SERVICE, "meshserve_rpc_server_calls", "Calls answered.", "method", "code"),
    _row("histogram", EVERY_SERVICE, "meshserve_rpc_server_duration_seconds", "Duration of calls answered.", "method"),
    _row("gauge", EVERY_SERVICE, "meshserve_rpc_server_active_calls", "Calls being answered.", "method"),
    _row("counter", EVERY_SERVICE, "meshserve_rpc_client_calls", "Calls made to other services.", "method", "code"),
    _row("histogram", EVERY_SERVICE, "meshserve_rpc_client_duration_seconds", "Duration of calls made.", "method"),
    _row("gauge", EVERY_SERVICE, "meshserve_rpc_client_replicas", "Replicas of another service that this one knows, by what they are to it: serving, leaving (serves on, but its name has its address no more), not_serving (starts, is unwell or drains), connecting, unreachable. One with two addresses is counted once, as the better of them, as soon as both have answered. Absent while none serves of a service that is switched off, or of engines that run only while they are asked for.", "peer", "target", "state", read=True),
    _row("counter", "gateway", "meshserve_gateway_requests", "Inference requests by how they ended; `reason` is empty for success.", "model", "tenant", "reason"),
    _row("histogram", "gateway", "meshserve_gateway_request_duration_seconds", "Duration of inference requests. Has exemplars.", "model", buckets=REQUEST_BUCKETS_S),
    _row("histogram", "gateway", "meshserve_gateway_time_to_first_token_seconds", "TTFT: time from arrival to the first text sent. Has exemplars.", "model", buckets=FIRST_TOKEN_BUCKETS_S),
    _row("histogram", "gateway", "meshserve_gateway_inter_token_latency_seconds", "ITL as a caller sees it: time between two messages with text of one choice of a stream. A message may bring several tokens. Answers from the cache are left out.", "model", buckets=TOKEN_INTERVAL_BUCKETS_S, frequent=True),
    _row("histogram", "gateway", "meshserve_gateway_time_per_output_token_seconds", "TPOT: time per completion token after the first, one value a request. Has exemplars.", "model", buckets=TOKEN_INTERVAL_BUCKETS_S),
    _row("gauge", "gateway", "meshserve_gateway_active_requests", "Inference requests in flight."),
    _row("gauge", "gateway", "meshserve_gateway_watchers", "Who watches: calls of WatchMesh, and live views of the console."),
    _row("counter", "gateway", "meshserve_http_server_calls", "Calls answered by HTTP. `route` is the pattern of a path; `other` stands for paths that are not served and methods that are not standard. `status` is 499 where the caller went away.", "method", "route", "status"),
    _row("histogram", "gateway", "meshserve_http_server_duration_seconds", "Duration of calls answered by HTTP. An event stream lasts for as long as it is read.", "method", "route"),
    _row("gauge", "gateway", "meshserve_http_server_active_calls", "Calls by HTTP being answered.", "route"),
    _row("gauge", "gateway", "meshserve_http_server_event_streams", "Of these, open event streams: answers of the playground, and what the console watches.", "route"),
    _row("gauge", "gateway", "meshserve_http_server_connections", "HTTP connections that are open, idle ones included.", read=True),
    _row("counter", "gateway", "meshserve_http_server_refused_connections", "HTTP connections refused beyond `gateway.max_http_connections`."),
    _row("gauge", "gateway", "meshserve_gateway_requests_awaiting_engine", "Requests that wait for an engine of a model with `activation_timeout_s` to be started.", "model"),
    _row("gauge", "gateway", "meshserve_gateway_model_engines", "Engines that may run a model, by what it is doing there: unloaded, loading, ready, sleeping, draining, failed.", "model", "state", read=True),
    _row("gauge", "gateway", "meshserve_gateway_adapters", "Adapters that requests can name.", "model", read=True),
    _row("counter", "gateway", "meshserve_gateway_hosting_calls", "Calls to engines that load or unload a model or an adapter, put to sleep or wake, for an operator or to give an engine what it should have; `reason` is empty for success.", "action", "reason"),
    _row("counter", "gateway", "meshserve_gateway_prompt_tokens", "Prompt tokens of requests answered.", "model", "tenant"),
    _row("counter", "gateway", "meshserve_gateway_cached_prompt_tokens", "Of these, tokens that an engine had in its prefix cache.", "model", "tenant"),
    _row("counter", "gateway", "meshserve_gateway_completion_tokens", "Completion tokens sent.", "model", "tenant"),
    _row("counter", "gateway", "meshserve_gateway_cached_responses", "Requests answered from the response cache.", "model", "tenant"),
    _row("counter", "gateway", "meshserve_gateway_cached_completion_tokens", "Completion tokens sent from the response cache, which no engine computed. Not among the completion tokens above.", "model", "tenant"),
    _row("counter", "gateway", "meshserve_gateway_inputs", "Texts, or pairs of texts, of the requests to encoders that were answered; `operation` is embeddings, classify or score.", "model", "tenant", "operation"),
    _row("counter", "gateway", "meshserve_gateway_cached_inputs", "Of these, texts whose vectors came from the response cache.", "model", "tenant"),
    _row("counter", "gateway", "meshserve_gateway_cost", "What the tokens of answers cost, by the prices of the models. Answers from the response cache cost nothing.", "model", "tenant", "currency"),
    _row("counter", "gateway", "meshserve_gateway_denials", "Calls denied for who makes them, of any method: keys, permissions, rate limits.", "reason"),
    _row("counter", "gateway", "meshserve_gateway_unchecked_requests", "Requests with text that passed while the safety filter was away.", "model"),
    _row("histogram", "gateway", "meshserve_gateway_stage_duration_seconds", "Duration of the stages of the request path.", "stage"),
    _row("counter", "tokenizer", "meshserve_tokenizer_encoded_tokens", "Tokens that texts were turned into.", "model"),
    _row("counter", "tokenizer", "meshserve_tokenizer_decoded_tokens", "Tokens that were turned into text.", "model"),
    _row("gauge", "tokenizer", "meshserve_tokenizer_decode_sessions", "Sequences being decoded."),
    _row("gauge", "engine", "meshserve_engine_info", "1, labelled with what the core runs and on what.", "model", "architecture", "dtype", "device", read=True),
    _row("gauge", "engine", "meshserve_engine_model_state", "1 for the state that a model of the engine is in, 0 for the others: unloaded, loading, ready, sleeping (until it is ready again), draining, failed.", "model", "state", read=True),
    _row("histogram", "engine", "meshserve_engine_load_duration_seconds", "Time that bringing a model into memory took, at start-up, on request or from sleep.", "model"),
    _row("gauge", "engine", "meshserve_engine_running_sequences", "Sequences computed in the current step.", "model", read=True),
    _row("gauge", "engine", "meshserve_engine_waiting_sequences", "Sequences waiting to be computed.", "model", read=True),
    _row("gauge", "engine", "meshserve_engine_kv_blocks_used", "Blocks of the KV cache in use.", "model", read=True),
    _row("gauge", "engine", "meshserve_engine_kv_blocks", "Blocks of the KV cache.", "model", read=True),
    _row("counter", "engine", "meshserve_engine_steps", "Steps computed.", "model"),
    _row("histogram", "engine", "meshserve_engine_step_duration_seconds", "Duration of steps.", "model"),
    _row("histogram", "engine", "meshserve_engine_batch_sequences", "Sequences computed in a step.", "model", buckets=SEQUENCE_BUCKETS),
    _row("histogram", "engine", "meshserve_engine_batch_tokens", "Tokens computed in a step.", "model", buckets=BATCH_BUCKETS),
    _row("counter", "engine", "meshserve_engine_prompt_tokens", "Prompt tokens computed.", "model"),
    _row("counter", "engine", "meshserve_engine_generated_tokens", "Tokens generated.", "model"),
    _row("counter", "engine", "meshserve_engine_preemptions", "Sequences put back in the queue because the KV cache was full.", "model"),
    _row("counter", "engine", "meshserve_engine_cache_queried_tokens", "Tokens looked up in the prefix cache as their sequences entered.", "model"),
    _row("counter", "engine", "meshserve_engine_cache_hit_tokens", "Of these, tokens that were there and were not computed again.", "model"),
    _row("counter", "engine", "meshserve_engine_drafted_tokens", "Tokens guessed ahead (speculative decoding) and verified.", "model"),
    _row("counter", "engine", "meshserve_engine_accepted_draft_tokens", "Of these, tokens that were right.", "model"),
    _row("counter", "engine", "meshserve_engine_failed_sequences", "Sequences that failed alone, such as with NaN logits.", "model"),
    _row("counter", "engine", "meshserve_engine_compiled_constraints", "Rules for outputs (JSON Schema and others) that were compiled, faulty ones included.", "model"),
    _row("counter", "engine", "meshserve_engine_found_constraints", "Rules that had been compiled already when they were sent.", "model"),
    _row("counter", "engine", "meshserve_engine_constraint_compile_seconds", "Time spent on compiling rules, beside the steps.", "model"),
    _row("counter", "engine", "meshserve_engine_masks", "Masks made of the tokens that may follow, one for each token of an output under a rule.", "model"),
    _row("counter", "engine", "meshserve_engine_mask_seconds", "Time spent on making masks.", "model"),
    _row("counter", "engine", "meshserve_engine_core_restarts", "Restarts of the core process.", "model"),
    _row("counter", "engine", "meshserve_engine_encoded_inputs", "Inputs that an encoder answered. `task` is `embed`, `classify` or `score`.", "model", "task"),
    _row("histogram", "engine", "meshserve_engine_queue_duration_seconds", "Time that requests waited before their first step.", "model"),
    _row("histogram", "engine", "meshserve_engine_prompt_length_tokens", "Prompt lengths of requests.", "model", buckets=TOKEN_BUCKETS),
    _row("gauge", "engine", "meshserve_engine_gpu_memory_used_bytes", "Memory of the GPU in use, by any process. Absent on a CPU.", "model", "device", read=True),
    _row("gauge", "engine", "meshserve_engine_gpu_memory_bytes", "Memory of the GPU. Absent on a CPU.", "model", "device", read=True),
    _row("gauge", "engine", "meshserve_engine_gpu_utilization", "Share of the time, 0 to 1, in which the GPU ran a kernel, as its driver measures it. Absent on a CPU.", "model", "device", read=True),
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


# The values of the labels, in the order of their names, and what is measured for them.
Reading = tuple[tuple[str, ...], float]


class _Read(Collector):
    """A counter or a gauge whose values are asked for when it is scraped."""

    def __init__(self, row: MetricDeclaration) -> None:
        self._sources: dict[object, Callable[[], Iterable[Reading]]] = {}
        self._row = row

    def ask(self, source: Callable[[], Iterable[Reading]]) -> Callable[[], object]:
        """Asks a source as well, until what is returned is called."""
        key = object()
        self._sources[key] = source
        return lambda: self._sources.pop(key, None)

    def collect(self) -> Iterable[CounterMetricFamily | GaugeMetricFamily]:
        """One family, which has no samples while there is nothing to measure."""
        row = self._row
        make = CounterMetricFamily if row.kind == "counter" else GaugeMetricFamily
        family = make(row.name, row.meaning, labels=row.labels)
        for source in list(self._sources.values()):
            for labels, value in source():
                family.add_metric(labels, value)
        yield family


def exemplar_of(span: trace.Span) -> dict[str, str] | None:
    """What leads from an observation to its trace, for `Histogram.observe`; None unless the span is
    one that is recorded and sent. Ask before the span has ended."""
    context = span.get_span_context()
    if not (span.is_recording() and context.trace_flags.sampled):
        return None
    return {"trace_id": trace.format_trace_id(context.trace_id)}


class Metrics:
    """The collectors of one service, and the HTTP port that shows them.

    Attributes:
        processes: those that make the service, by the value of the label `process`: what gives
            their ids, or None while there is none.
    """

    def __init__(self, service: str) -> None:
        self.service = service
        self.registry = CollectorRegistry()
        self.processes: dict[str, Callable[[], int | None]] = {"main": os.getpid}
        self._collectors: dict[str, Counter | Gauge | Histogram] = {}
        self._read: dict[str, _Read] = {}
        self._distributions: dict[str, Distributions] = {}
        for row in METRICS:
            if row.service not in (EVERY_SERVICE, service):
                continue
            if row.read:
                self._read[row.name] = _Read(row)
                self.registry.register(self._read[row.name])
            elif row.frequent:
                made = Distributions(row.name, row.meaning, row.labels, row.buckets)
                self._distributions[row.name] = made
                self.registry.register(made)
            else:
                self._collectors[row.name] = self._make(row)
        for name, readings in process_readings(self.processes).items():
            self.read(name, readings)

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

    def distributions(self, name: str) -> Distributions:
        """A declared histogram that is `frequent`; KeyError for a name that is not in the table."""
        return self._distributions[name]

    def read(self, name: str, source: Callable[[], Iterable[Reading]]) -> Callable[[], object]:
        """Has a metric that is declared as `read` ask `source` for values; returns what ends that.
        KeyError for one that is not."""
        return self._read[name].ask(source)

    def serve(self, host: str, port: int) -> None:
        """Answers `GET /metrics` from a thread of its own: in OpenMetrics, which has exemplars, to
        those who accept it. Raises OSError when the port is taken."""
        start_http_server(port, addr=host, registry=self.registry)

    def _make(self, row: MetricDeclaration) -> Counter | Gauge | Histogram:
        if row.kind == "counter":
            return _KeptCounter(row.name, row.meaning, row.labels, registry=self.registry)
        if row.kind == "gauge":
            return _KeptGauge(row.name, row.meaning, row.labels, registry=self.registry)
        return _KeptHistogram(
            row.name, row.meaning, row.labels, registry=self.registry, buckets=row.buckets
        )
