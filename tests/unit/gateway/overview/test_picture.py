"""The picture: what it says of metrics that real collectors hold."""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Callable, Sequence
from typing import Any

import psutil
import pytest

from meshserve.v1 import engine_pb2, mesh_pb2, monitor_pb2
from services.gateway.overview.picture import snapshot
from services.gateway.overview.readings import Reading, Window
from services.gateway.overview.replicas import Replica
from services.runtime.health import HealthMonitor
from services.runtime.monitor import Monitor
from services.runtime.settings import Settings, parse_settings
from services.runtime.telemetry import Metrics

SETTINGS = {
    "models": {
        "small": {"source": "smollm2-135m", "price": {"prompt": 1, "completion": 2}},
        "large": {"source": "smollm2-135m", "engine_target": "dns:///large:50053"},
    },
    "gateway": {
        "currency": "EUR",
        "rate_limit": {"requests_per_minute": 60},
        "auth": {
            "keys": [
                {"name": "acme", "sha256": "a" * 64, "requests_per_minute": 600},
                {"name": "acme", "sha256": "b" * 64, "requests_per_minute": 90},
                {"name": "zeta", "sha256": "c" * 64},
            ]
        },
    },
}
SECONDS = 10
Act = Callable[[Metrics], object]


def settings(**more: Any) -> Settings:
    return parse_settings(SETTINGS | more, {})


async def replica(service: str, act: Act, address: str = "a:1", **known: Any) -> Replica:
    """A replica that does something within a window of ten seconds."""

    async def healthy() -> None:
        return None

    metrics = Metrics(service)
    health = HealthMonitor([], healthy, metrics)
    monitor = Monitor(health, metrics, asyncio.Event())
    await health.start()
    first = Reading(0, monitor.status())
    act(metrics)
    last = Reading(SECONDS, monitor.status())
    await health.shut_down()
    return Replica(service, address, Window(first, last), **known)


def answered(**by_reason: int) -> Act:
    """A gateway's requests to the model `small`, by how they ended; `ok` is success."""

    def act(metrics: Metrics) -> None:
        for reason, count in by_reason.items():
            labels = ("small", "acme", "" if reason == "ok" else reason)
            metrics.counter("meshserve_gateway_requests").labels(*labels).inc(count)

    return act


async def picture(*replicas: Replica, **more: Any) -> mesh_pb2.MeshSnapshot:
    return snapshot(replicas, settings(**more))


async def test_a_caller_who_leaves_is_neither_a_success_nor_a_failure() -> None:
    gateway = await replica("gateway", answered(ok=6, RATE_LIMITED=2, INTERNAL=2, CANCELLED=90))
    mesh = await picture(gateway)
    assert mesh.traffic.requests_per_second == 10
    assert mesh.traffic.error_ratio == pytest.approx(0.4)
    assert {each.name for each in mesh.traffic.errors} == {"RATE_LIMITED", "INTERNAL"}
    (shown,) = mesh.services[0].replicas
    assert shown.error_ratio == pytest.approx(0.02), "a limit is no fault of the gateway's"


async def test_gateways_add_up() -> None:
    mesh = await picture(
        await replica("gateway", answered(ok=10)),
        await replica("gateway", answered(ok=20, INTERNAL=10), "b:1"),
    )
    assert mesh.traffic.requests_total == 40
    assert mesh.traffic.requests_per_second == 4
    assert mesh.traffic.error_ratio == 0.25
    assert [each.requests_total for each in mesh.models] == [40, 0]


async def test_tenants_have_the_limits_of_their_keys() -> None:
    mesh = await picture(await replica("gateway", answered(ok=5)))
    limits = {each.tenant: each.requests_per_minute_limit for each in mesh.tenants}
    assert limits == {"acme": 600, "zeta": 60}
    unlimited = await picture(gateway={})
    assert [each.tenant for each in unlimited.tenants] == []


async def test_costs_are_told_where_there_are_prices() -> None:
    def act(metrics: Metrics) -> None:
        metrics.counter("meshserve_gateway_cost").labels("small", "acme", "EUR").inc(0.5)

    mesh = await picture(await replica("gateway", act))
    assert mesh.currency == "EUR"
    assert mesh.traffic.cost_total == 0.5
    assert mesh.traffic.cost_per_hour == pytest.approx(180)
    assert mesh.models[0].cost_total == 0.5
    assert not mesh.models[1].HasField("cost_total")
    free = await picture(models={"small": {"source": "smollm2-135m"}})
    assert not free.traffic.HasField("cost_total")


async def test_who_waits_for_anothers_answer_looks_once() -> None:
    """The first look, which says `pending`, is followed by one that has the answer."""

    def act(metrics: Metrics) -> None:
        for outcome, count in (("hit", 3), ("pending", 2), ("coalesced", 2), ("miss", 5)):
            metrics.counter("meshserve_cache_lookups").labels(outcome).inc(count)

    mesh = await picture(await replica("cache", act))
    assert mesh.response_cache.lookups_per_second == 1
    assert mesh.response_cache.hit_ratio == 0.5


async def test_what_is_off_is_not_there() -> None:
    mesh = await picture(cache={"enabled": False}, safety={"enabled": False})
    assert not mesh.HasField("response_cache")
    assert not mesh.HasField("safety")
    enabled = {each.service: each.enabled for each in mesh.services}
    assert enabled == {
        "gateway": True, "tokenizer": True, "engine": True,
        "cache": False, "safety": False, "valkey": True,
    }  # fmt: skip


def computing(model: str, tokens: int = 0, queried: int = 0, hits: int = 0) -> Act:
    def act(metrics: Metrics) -> None:
        for name, count in (
            ("steps", 10),
            ("generated_tokens", tokens),
            ("cache_queried_tokens", queried),
            ("cache_hit_tokens", hits),
        ):
            metrics.counter(f"meshserve_engine_{name}").labels(model).inc(count)
        metrics.read("meshserve_engine_kv_blocks", lambda: [((model,), 100.0)])
        metrics.read("meshserve_engine_kv_blocks_used", lambda: [((model,), 25.0)])

    return act


async def test_engines_belong_to_the_models_that_they_run() -> None:
    mesh = await picture(
        await replica("engine", computing("small", tokens=500, queried=100, hits=30)),
        await replica("engine", computing("small"), "b:1"),
        await replica("engine", computing("large"), "c:1"),
        Replica("engine", "d:1", None, "Connection refused", models=("large",)),
    )
    small, large = mesh.models
    assert (small.engines, small.serving_engines, small.ready) == (2, 2, True)
    assert (large.engines, large.serving_engines, large.ready) == (2, 1, True)
    assert small.kv_use_ratio == 0.25
    engine = mesh.services[2].replicas[0].engine
    assert engine.generated_tokens_per_second == 50
    assert engine.prefix_hit_ratio == pytest.approx(0.3)
    assert not engine.HasField("draft_acceptance_ratio"), "nothing was guessed"
    away = mesh.services[2].replicas[3]
    assert away.state == monitor_pb2.REPLICA_STATE_UNREACHABLE
    assert not away.HasField("engine")


async def test_questions_about_the_mesh_itself_are_no_work() -> None:
    def act(metrics: Metrics) -> None:
        calls = metrics.counter("meshserve_rpc_server_calls")
        durations = metrics.histogram("meshserve_rpc_server_duration_seconds")
        for method, code, count in (
            ("meshserve.v1.TokenizerService/Encode", "OK", 30),
            ("meshserve.v1.TokenizerService/Encode", "INTERNAL", 10),
            ("meshserve.v1.TokenizerService/StreamDecode", "OK", 1),
            ("meshserve.v1.MonitorService/GetStatus", "OK", 1000),
        ):
            calls.labels(method, code).inc(count)
            durations.labels(method).observe(0.004 if code == "OK" else 60)
        metrics.gauge("meshserve_tokenizer_decode_sessions").set(7)

    mesh = await picture(await replica("tokenizer", act))
    (shown,) = mesh.services[1].replicas
    assert shown.calls_per_second == 4
    assert shown.error_ratio == 0.25
    assert shown.latency.count == 2
    assert shown.active_calls == 7


def links_of(mesh: mesh_pb2.MeshSnapshot) -> dict[Sequence[str], float]:
    return {(each.from_service, each.to_service): each.calls_per_second for each in mesh.links}


async def test_latencies_are_told_by_their_quantiles() -> None:
    """Of a hundred requests five take long; with a finite bound above them, no more than it."""

    def act(metrics: Metrics) -> None:
        duration = metrics.histogram("meshserve_gateway_request_duration_seconds").labels("small")
        for number in range(100):
            duration.observe(0.02 if number < 94 else 9.0)

    mesh = await picture(await replica("gateway", act))
    told = mesh.traffic.duration
    assert told.count == 100
    assert told.mean_ms == pytest.approx(10 * (94 * 0.02 + 6 * 9.0))
    assert told.p50_ms < 100
    assert 1000 < told.p95_ms <= told.p99_ms


async def test_a_replica_is_as_old_as_its_main_process() -> None:
    """The core of an engine may have been started again since."""

    def act(metrics: Metrics) -> None:
        metrics.processes["core"] = os.getpid

    (engine,) = (await picture(await replica("engine", act))).services[2].replicas
    started_s = psutil.Process().create_time()
    assert engine.uptime_ms == pytest.approx(1000 * (time.time() - started_s), abs=60_000)


async def test_the_caches_commands_are_a_link_to_what_lies_behind_it() -> None:
    def act(metrics: Metrics) -> None:
        for _ in range(20):
            metrics.histogram("meshserve_cache_backend_duration_seconds").labels("get").observe(
                0.001
            )

    mesh = await picture(await replica("cache", act), await replica("cache", act, "b:1"))
    assert links_of(mesh) == {("cache", "valkey"): 4}
    (link,) = mesh.links
    assert link.latency.count == 40


async def test_engines_tell_how_they_guess_and_preempt() -> None:
    def card(value: float) -> list[tuple[tuple[str, str], float]]:
        """What two models of an engine tell of the card that both are on."""
        return [(("small", "cuda:0"), value), (("large", "cuda:0"), value)]

    def act(metrics: Metrics) -> None:
        for name, count in (
            ("drafted_tokens", 40),
            ("accepted_draft_tokens", 10),
            ("preemptions", 5),
        ):
            metrics.counter(f"meshserve_engine_{name}").labels("small").inc(count)
        metrics.read("meshserve_engine_gpu_memory_bytes", lambda: card(80.0))
        metrics.read("meshserve_engine_gpu_memory_used_bytes", lambda: card(60.0))

    (shown,) = (await picture(await replica("engine", act))).services[2].replicas
    assert shown.engine.draft_acceptance_ratio == 0.25
    assert (shown.engine.preemptions_per_second, shown.engine.preemptions_total) == (0.5, 5)
    assert (shown.engine.gpu_memory_used_bytes, shown.engine.gpu_memory_bytes) == (60, 80)


async def test_who_waits_for_an_engine_is_shown_at_its_model() -> None:
    def act(metrics: Metrics) -> None:
        metrics.gauge("meshserve_gateway_requests_awaiting_engine").labels("large").set(3)

    mesh = await picture(await replica("gateway", act))
    assert [each.requests_awaiting_engine for each in mesh.models] == [0, 3]


async def test_links_are_what_callers_have_called() -> None:
    def act(metrics: Metrics) -> None:
        for method in ("TokenizerService/Encode", "EngineService/Generate"):
            metrics.counter("meshserve_rpc_client_calls").labels(
                f"meshserve.v1.{method}", "OK"
            ).inc(20)

    mesh = await picture(await replica("gateway", act), await replica("gateway", act, "b:1"))
    assert links_of(mesh) == {("gateway", "tokenizer"): 4, ("gateway", "engine"): 4}


async def test_models_of_one_engine_are_told_apart() -> None:
    def act(metrics: Metrics) -> None:
        states = {"small": "ready", "large": "sleeping"}
        metrics.read(
            "meshserve_engine_model_state",
            lambda: [
                ((model, state), float(states[model] == state))
                for model in states
                for state in ("ready", "sleeping", "unloaded")
            ],
        )
        metrics.read(
            "meshserve_engine_running_sequences", lambda: [(("small",), 3.0), (("large",), 0.0)]
        )

    engine = await replica("engine", act)
    mesh = await picture(
        engine, models={name: {"source": "x"} for name in ("small", "large", "no")}
    )
    shown = {each.model: each for each in mesh.models}
    assert shown["small"].running_sequences == 3
    assert shown["large"].running_sequences == 0
    states = {name: engine_pb2.ModelState.Name(each.state) for name, each in shown.items()}
    assert states == {
        "small": "MODEL_STATE_READY",
        "large": "MODEL_STATE_SLEEPING",
        "no": "MODEL_STATE_UNSPECIFIED",
    }
    assert [each.serving_engines for each in mesh.models] == [1, 1, 0]
    assert mesh.services[2].replicas[0].engine.model == "small, large"
