"""Services, replicas and engines of the picture, and the calls between services."""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from meshserve.v1 import mesh_pb2, monitor_pb2
from services.gateway.overview.rates import Histogram, merged, ratio
from services.gateway.overview.readings import Labels, Window
from services.runtime.reasons import REASONS, Reason

# In the order in which a request meets them.
SERVICES = ("gateway", "tokenizer", "engine", "cache", "safety", "valkey")

# Who answers the methods of a gRPC service.
_ANSWERED_BY = {
    "meshserve.v1.InferenceService": "gateway",
    "meshserve.v1.TokenizerService": "tokenizer",
    "meshserve.v1.EngineService": "engine",
    "meshserve.v1.CacheService": "cache",
    "meshserve.v1.SafetyService": "safety",
}
# Streams that stand open between services. What they carry is counted by itself.
_STANDING = frozenset(
    {
        "meshserve.v1.EngineService/GenerateMany",
        "meshserve.v1.EngineService/WatchLoad",
        "meshserve.v1.TokenizerService/StreamDecode",
        "meshserve.v1.SafetyService/CheckCompletion",
    }
)
# The fault of who answers, as the semantic conventions of OpenTelemetry see it.
_FAULTS = frozenset(
    {"UNKNOWN", "DEADLINE_EXCEEDED", "UNIMPLEMENTED", "INTERNAL", "UNAVAILABLE", "DATA_LOSS"}
)
_SESSIONS = {
    "tokenizer": "meshserve_tokenizer_decode_sessions",
    "safety": "meshserve_safety_completion_sessions",
}

# States of a model in which an engine answers for it; empty where it does not tell.
_TAKES_REQUESTS = ("", "ready", "sleeping")


@dataclass(frozen=True, slots=True)
class Replica:
    """One replica and what is known of it.

    Attributes:
        window: what it has said; None while it does not answer.
        problem: why it does not answer.
        models: those that its target is for; only of engines.
        reporting: whether it is this process.
    """

    service: str
    address: str
    window: Window | None
    problem: str = ""
    models: tuple[str, ...] = ()
    reporting: bool = False

    @property
    def state(self) -> monitor_pb2.ReplicaState.ValueType:
        """How it does."""
        if self.window is None:
            return monitor_pb2.REPLICA_STATE_UNREACHABLE
        return self.window.last.status.state

    @property
    def instance_id(self) -> str:
        """Tells processes apart; empty while it does not answer."""
        return self.window.last.status.instance_id if self.window is not None else ""

    @property
    def hosted(self) -> dict[str, str]:
        """The models that an engine hosts, each with its state, which is empty where it does not
        tell. Nothing while it does not answer."""
        if self.window is None:
            return {}
        hosted = {
            labels.get("model", ""): ""
            for labels, _ in self.window.last.series("meshserve_engine_steps")
        }
        for labels, sample in self.window.last.series("meshserve_engine_model_state"):
            if sample.value:
                hosted[labels.get("model", "")] = labels.get("state", "")
        return hosted

    def runs(self, model: str) -> bool:
        """Whether it is an engine of a model, as far as is known."""
        return model in self.hosted or (self.window is None and model in self.models)

    def serves(self, model: str) -> bool:
        """Whether it takes requests for a model now."""
        return (
            self.state == monitor_pb2.REPLICA_STATE_SERVING
            and self.hosted.get(model, "") in _TAKES_REQUESTS
        )


def windows(replicas: Iterable[Replica], service: str) -> list[Window]:
    """What the replicas of a service have said."""
    return [r.window for r in replicas if r.service == service and r.window is not None]


def latency(histogram: Histogram | None) -> mesh_pb2.LatencyOverview | None:
    """A histogram of seconds as the picture has it."""
    if histogram is None or not histogram.count:
        return None
    return mesh_pb2.LatencyOverview(
        count=round(histogram.count),
        mean_ms=1000 * histogram.mean,
        p50_ms=1000 * histogram.quantile(0.50),
        p95_ms=1000 * histogram.quantile(0.95),
        p99_ms=1000 * histogram.quantile(0.99),
    )


def is_fault(reason: str) -> bool:
    """Whether a request that ended for a reason failed by the mesh's own fault."""
    if not reason:
        return False
    return reason not in Reason.__members__ or REASONS[Reason(reason)].code.name in _FAULTS


def service_overviews(
    replicas: Sequence[Replica], enabled: dict[str, bool]
) -> list[mesh_pb2.ServiceOverview]:
    """Every service with its replicas; services that are not in `enabled` are."""
    return [
        mesh_pb2.ServiceOverview(
            service=service,
            enabled=enabled.get(service, True),
            replicas=[_replica(replica) for replica in replicas if replica.service == service],
        )
        for service in SERVICES
    ]


def link_overviews(replicas: Sequence[Replica]) -> list[mesh_pb2.LinkOverview]:
    """The calls between services that the callers have made so far."""
    links: dict[tuple[str, str], list[Window]] = {}
    for replica in replicas:
        if replica.window is None:
            continue
        for labels, _ in replica.window.last.series("meshserve_rpc_client_calls"):
            answering = _answering(labels)
            if answering is not None:
                calling = links.setdefault((replica.service, answering), [])
                if replica.window not in calling:
                    calling.append(replica.window)
    overviews = [_link(*ends, calling) for ends, calling in links.items()]
    backend = _backend_link(windows(replicas, "cache"))
    return [*overviews, *([backend] if backend is not None else [])]


def _replica(replica: Replica) -> mesh_pb2.ReplicaOverview:
    overview = mesh_pb2.ReplicaOverview(
        address=replica.address,
        service=replica.service,
        state=replica.state,
        problem=replica.problem,
        reporting=replica.reporting,
    )
    window = replica.window
    if window is None:
        return overview
    status = window.last.status
    overview.problem = status.problem
    overview.instance_id = status.instance_id
    overview.version = status.version
    started_s = window.total("meshserve_process_start_time_seconds", _main_process)
    if started_s:
        overview.uptime_ms = max(0, round(1000 * (time.time() - started_s)))
    if window.seconds:
        overview.cpu_cores = window.rate("meshserve_process_cpu_seconds")
    overview.memory_bytes = round(window.total("meshserve_process_resident_memory_bytes"))
    if replica.service == "gateway":
        _add_requests(overview, window)
    elif replica.service == "valkey":
        overview.calls_per_second = window.rate("valkey_commands")
    else:
        _add_calls(overview, window)
    if replica.service == "engine":
        overview.engine.CopyFrom(_engine(", ".join(replica.hosted), window))
    return overview


def _add_requests(overview: mesh_pb2.ReplicaOverview, window: Window) -> None:
    """A gateway's calls are its inference requests, whichever door they came through."""
    name = "meshserve_gateway_requests"
    ended = window.rate(name)
    overview.calls_per_second = ended
    overview.active_calls = round(window.total("meshserve_gateway_active_requests"))
    failed = ratio(window.rate(name, lambda labels: is_fault(labels.get("reason", ""))), ended)
    if failed is not None:
        overview.error_ratio = failed
    _set_latency(overview, window.observed("meshserve_gateway_request_duration_seconds"))


def _add_calls(overview: mesh_pb2.ReplicaOverview, window: Window) -> None:
    name = "meshserve_rpc_server_calls"

    def own(labels: Labels) -> bool:
        return _answering(labels) == overview.service

    answered = window.rate(name, own)
    overview.calls_per_second = answered
    active = window.total("meshserve_rpc_server_active_calls", own)
    if overview.service in _SESSIONS:
        active += window.total(_SESSIONS[overview.service])
    overview.active_calls = round(active)
    failed = ratio(window.rate(name, lambda labels: own(labels) and _failed(labels)), answered)
    if failed is not None:
        overview.error_ratio = failed
    _set_latency(overview, window.observed("meshserve_rpc_server_duration_seconds", own))


def _engine(model: str, window: Window) -> mesh_pb2.EngineOverview:
    def total(name: str) -> int:
        return round(window.total(f"meshserve_engine_{name}"))

    def rate(name: str) -> float:
        return window.rate(f"meshserve_engine_{name}")

    batch = window.observed("meshserve_engine_batch_tokens")
    info = window.last.series("meshserve_engine_info")
    overview = mesh_pb2.EngineOverview(
        model=model,
        running_sequences=total("running_sequences"),
        waiting_sequences=total("waiting_sequences"),
        kv_blocks_used=total("kv_blocks_used"),
        kv_blocks=total("kv_blocks"),
        prompt_tokens_per_second=rate("prompt_tokens"),
        generated_tokens_per_second=rate("generated_tokens"),
        prefix_hit_ratio=ratio(rate("cache_hit_tokens"), rate("cache_queried_tokens")),
        draft_acceptance_ratio=ratio(rate("accepted_draft_tokens"), rate("drafted_tokens")),
        preemptions_per_second=rate("preemptions"),
        preemptions_total=total("preemptions"),
        steps_per_second=rate("steps"),
        step_time=latency(window.observed("meshserve_engine_step_duration_seconds")),
        batch_tokens=batch.mean if batch is not None else None,
        queue_time=latency(window.observed("meshserve_engine_queue_duration_seconds")),
        core_restarts_total=total("core_restarts"),
        generated_tokens_total=total("generated_tokens"),
        prompt_tokens_total=total("prompt_tokens"),
        device=info[0][0].get("device", "") if info else "",
    )
    for name in ("gpu_memory_bytes", "gpu_memory_used_bytes", "gpu_utilization"):
        # Each model tells of the card, which all of them are on.
        told = [sample.value for _, sample in window.last.series(f"meshserve_engine_{name}")]
        if told:
            setattr(overview, name, max(told) if name == "gpu_utilization" else round(max(told)))
    return overview


def _link(calling: str, answering: str, callers: Sequence[Window]) -> mesh_pb2.LinkOverview:
    name = "meshserve_rpc_client_calls"

    def between(labels: Labels) -> bool:
        return _answering(labels) == answering

    ended = sum(window.rate(name, between) for window in callers)
    failed = sum(
        window.rate(name, lambda labels: between(labels) and _failed(labels)) for window in callers
    )
    durations = [
        window.observed("meshserve_rpc_client_duration_seconds", between) for window in callers
    ]
    return mesh_pb2.LinkOverview(
        from_service=calling,
        to_service=answering,
        calls_per_second=ended,
        error_ratio=ratio(failed, ended),
        latency=latency(merged(each for each in durations if each is not None)),
    )


def _backend_link(caches: Sequence[Window]) -> mesh_pb2.LinkOverview | None:
    """The cache's commands to Valkey, whose failures it does not count."""
    if not caches:
        return None
    observed = [window.observed("meshserve_cache_backend_duration_seconds") for window in caches]
    return mesh_pb2.LinkOverview(
        from_service="cache",
        to_service="valkey",
        calls_per_second=sum(
            histogram.count / window.seconds
            for window, histogram in zip(caches, observed, strict=True)
            if histogram is not None
        ),
        latency=latency(merged(each for each in observed if each is not None)),
    )


def _answering(labels: Labels) -> str | None:
    """Who answers the method of a metric; None of what is about the mesh itself."""
    method = labels.get("method", "")
    return None if method in _STANDING else _ANSWERED_BY.get(method.partition("/")[0])


def _failed(labels: Labels) -> bool:
    return labels.get("code") in _FAULTS


def _main_process(labels: Labels) -> bool:
    return labels.get("process", "main") == "main"


def _set_latency(overview: mesh_pb2.ReplicaOverview, histogram: Histogram | None) -> None:
    found = latency(histogram)
    if found is not None:
        overview.latency.CopyFrom(found)
