"""The picture of the whole mesh, beside real services: it agrees with what they do."""

from __future__ import annotations

import copy
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import grpc
import pytest

from meshserve.v1 import mesh_pb2, mesh_pb2_grpc, monitor_pb2, monitor_pb2_grpc
from tests.integration.mesh.test_gateways import bearer, digest, gateway_settings
from tests.support.errors import failure_of
from tests.support.mesh import Mesh
from tests.support.otlp import Receiver
from tests.support.ports import free_ports
from tests.support.process import ServiceProcess
from tests.support.terminal import Terminal

SERVING = monitor_pb2.REPLICA_STATE_SERVING
UNREACHABLE = monitor_pb2.REPLICA_STATE_UNREACHABLE
GET_STATUS = "meshserve.v1.MonitorService/GetStatus"
Picture = mesh_pb2.MeshSnapshot


class Watch:
    """Somebody who watches; holds the newest picture."""

    def __init__(self, target: str, key: str | None = None, interval_ms: int = 250) -> None:
        self._channel = grpc.insecure_channel(target)
        stub = mesh_pb2_grpc.MeshServiceStub(self._channel)
        self._call: Any = stub.WatchMesh(
            mesh_pb2.WatchMeshRequest(interval_ms=interval_ms),
            metadata=bearer(key) if key else None,
            timeout=120,
        )
        self._end: Any = None
        self.times: list[float] = []
        self.latest = Picture()
        self._came = threading.Condition()
        self._thread = threading.Thread(target=self._read)
        self._thread.start()

    def __enter__(self) -> Watch:
        self.until(lambda picture: picture.window_ms > 0)
        return self

    def __exit__(self, *_: object) -> None:
        self._call.cancel()
        self._thread.join()
        self._channel.close()
        assert self._end.code() is grpc.StatusCode.CANCELLED, self._end

    def until(self, holds: Callable[[Picture], object], within_s: float = 20.0) -> Picture:
        """The first picture from now on that something holds of."""
        with self._came:
            seen = len(self.times)
            assert self._came.wait_for(
                lambda: len(self.times) > seen and holds(self.latest), within_s
            ), self.latest
            return self.latest

    def _read(self) -> None:
        try:
            for response in self._call:
                with self._came:
                    self.latest = response.mesh
                    self.times.append(time.monotonic())
                    self._came.notify_all()
        except grpc.RpcError as error:
            self._end = error


def replicas(picture: Picture, service: str) -> list[mesh_pb2.ReplicaOverview]:
    return [
        each for found in picture.services if found.service == service for each in found.replicas
    ]


def test_the_numbers_are_those_of_what_was_sent_and_of_the_metrics(mesh: Mesh) -> None:
    with Watch(mesh.target) as watch, mesh.client() as client:
        before = watch.until(lambda picture: picture.traffic.active_requests == 0)
        answers = [
            client.generate(f"A story of {n} and {time.time()}:", max_tokens=8, ignore_eos=True)
            for n in range(5)
        ]
        known = client.generate("Twice the same.", max_tokens=8, temperature=0)
        again = client.generate("Twice the same.", max_tokens=8, temperature=0)
        with pytest.raises(Exception, match="no model"):
            client.generate("x", model="marmalade")
        assert again.cached
        prompt = sum(each.usage.prompt_tokens for each in (*answers, known))
        completion = sum(each.usage.completion_tokens for each in (*answers, known))

        def grown(picture: Picture, name: str) -> int:
            return int(getattr(picture.traffic, name) - getattr(before.traffic, name))

        after = watch.until(lambda picture: grown(picture, "requests_total") == 8)
        assert grown(after, "prompt_tokens_total") == prompt
        assert grown(after, "completion_tokens_total") == completion
        assert grown(after, "cached_responses_total") == 1
        errors = {each.name: each.total for each in after.traffic.errors}
        assert errors["MODEL_NOT_FOUND"] >= 1
        (engine,) = replicas(after, "engine")
        (engine_before,) = replicas(before, "engine")
        generated = (
            engine.engine.generated_tokens_total - engine_before.engine.generated_tokens_total
        )
        assert generated >= completion

        def metric(name: str, **labels: str) -> float:
            return mesh.metric("gateway", name, **labels)

        assert after.traffic.requests_total == metric("meshserve_gateway_requests_total")
        assert after.traffic.completion_tokens_total == metric(
            "meshserve_gateway_completion_tokens_total"
        )
        assert engine.engine.generated_tokens_total == mesh.metric(
            "engine", "meshserve_engine_generated_tokens_total"
        )
        assert engine.engine.kv_blocks == mesh.metric("engine", "meshserve_engine_kv_blocks")
        (model,) = after.models
        assert (model.model, model.ready, model.engines) == ("smollm2-135m", True, 1)
        assert model.requests_total == metric(
            "meshserve_gateway_requests_total", model="smollm2-135m"
        )
        (tenant,) = after.tenants
        assert (tenant.tenant, tenant.requests_total) == ("anonymous", after.traffic.requests_total)
        lookups = {each.name: each.total for each in after.response_cache.lookups}
        assert lookups["hit"] == mesh.metric(
            "cache", "meshserve_cache_lookups_total", outcome="hit"
        )
        allowed = {each.name: each.total for each in after.safety.actions}["allow"]
        assert allowed == mesh.metric("safety", "meshserve_safety_checks_total", action="allow")


def test_rates_and_latencies_are_those_of_the_window(mesh: Mesh) -> None:
    with Watch(mesh.target) as watch, mesh.client() as client:
        total = watch.latest.traffic.requests_total
        began = time.monotonic()
        for n in range(4):
            with client.stream_generate(f"Count {n} {time.time()}:", max_tokens=12) as stream:
                stream.collect()
        took_ms = 1000 * (time.monotonic() - began)
        picture = watch.until(lambda each: each.traffic.requests_total == total + 4)
        traffic = picture.traffic
        ended = traffic.requests_per_second * picture.window_ms / 1000
        assert ended == pytest.approx(traffic.duration.count, rel=0.01)
        if took_ms < 8_000:
            assert ended > 3.9, "all of it lies in the window"
        assert 0 < traffic.time_to_first_token.p50_ms <= traffic.duration.p99_ms
        (engine,) = replicas(picture, "engine")
        assert engine.engine.steps_per_second > 0
        assert engine.engine.step_time.p50_ms > 0
        links = {(each.from_service, each.to_service): each for each in picture.links}
        assert links["gateway", "engine"].calls_per_second > 0
        assert [each.stage for each in traffic.stages][:3] == ["authenticate", "admit", "route"]


def test_every_service_is_there_with_what_its_process_takes(mesh: Mesh) -> None:
    with Watch(mesh.target) as watch:
        picture = watch.latest
        assert [each.service for each in picture.services] == [
            "gateway", "tokenizer", "engine", "cache", "safety", "valkey",
        ]  # fmt: skip
        for service in picture.services:
            (replica,) = service.replicas
            assert replica.state == SERVING, replica
            assert replica.version
            assert 1000 < replica.uptime_ms < 3_600_000
            assert 2**20 < replica.memory_bytes < 2**34
            assert 0 <= replica.cpu_cores < 64
        (gateway,) = replicas(picture, "gateway")
        assert gateway.reporting
        assert gateway.address == mesh.target


def polls(mesh: Mesh) -> float:
    return mesh.metric("engine", "meshserve_rpc_server_calls_total", method=GET_STATUS)


def test_three_watchers_cost_as_much_as_one_and_none_costs_nothing(mesh: Mesh) -> None:
    with Watch(mesh.target), Watch(mesh.target), Watch(mesh.target) as last:
        before, seen = polls(mesh), len(last.times)
        time.sleep(2)
        shown = len(last.times) - seen
        assert polls(mesh) - before <= shown + 2
    time.sleep(0.5)
    before = polls(mesh)
    time.sleep(1)
    assert polls(mesh) == before


def test_watching_leaves_no_spans(mesh: Mesh, otlp: Receiver) -> None:
    with Watch(mesh.target):
        time.sleep(1)
    time.sleep(1.5)  # spans are sent once a second
    assert not [span for span in otlp.spans if "GetStatus" in span.name]


@contextmanager
def beside(mesh: Mesh, folder: Path, settings: dict[str, Any]) -> Iterator[str]:
    """The target of one more gateway."""
    with ServiceProcess("gateway", folder / "gateway", settings) as process:
        process.wait_until_healthy()
        yield process.address


def test_only_an_operator_may_watch_where_keys_are_asked_for(mesh: Mesh, tmp_path: Path) -> None:
    keys = [
        {"name": "ops", "sha256": digest("key-ops"), "operator": True},
        {"name": "acme", "sha256": digest("key-acme"), "requests_per_minute": 90},
    ]
    settings = gateway_settings(mesh, gateway={"auth": {"mode": "required", "keys": keys}})
    with beside(mesh, tmp_path, settings) as target, grpc.insecure_channel(target) as channel:
        stub = mesh_pb2_grpc.MeshServiceStub(channel)
        monitor = monitor_pb2_grpc.MonitorServiceStub(channel)

        def refused(key: str | None) -> tuple[str, str]:
            reasons = []
            for ask in (
                lambda metadata: next(iter(stub.WatchMesh(WATCH, metadata=metadata, timeout=5))),
                lambda metadata: monitor.GetStatus(STATUS, metadata=metadata, timeout=5),
            ):
                with pytest.raises(grpc.RpcError) as caught:
                    ask(bearer(key) if key else None)
                reasons.append(failure_of(caught.value).reason)
            return reasons[0], reasons[1]

        assert refused("key-acme") == ("NOT_AN_OPERATOR", "NOT_AN_OPERATOR")
        assert refused("key-wrong") == ("API_KEY_INVALID", "API_KEY_INVALID")
        assert refused(None) == ("API_KEY_MISSING", "API_KEY_MISSING")
        with Watch(target, "key-ops") as watch:
            tenants = {each.tenant: each for each in watch.latest.tenants}
            assert set(tenants) == {"acme", "ops"}
            assert tenants["acme"].requests_per_minute_limit == 90
            assert not tenants["ops"].HasField("requests_per_minute_limit")


WATCH = mesh_pb2.WatchMeshRequest()
STATUS = monitor_pb2.GetStatusRequest()


def test_gateways_that_have_a_common_target_are_counted_together(
    mesh: Mesh, tmp_path: Path
) -> None:
    settings = gateway_settings(mesh)
    own = settings["gateway"]["listen"]
    settings["gateway"]["target"] = f"dns:///{mesh.target},{own}"
    with beside(mesh, tmp_path, settings) as target, Watch(target) as watch:
        watch.until(lambda picture: len(replicas(picture, "gateway")) == 2)
        total = watch.latest.traffic.requests_total
        with mesh.client() as client:
            client.generate("Hello", max_tokens=2)
        picture = watch.until(lambda each: each.traffic.requests_total == total + 1)
        reporting = {each.address: each.reporting for each in replicas(picture, "gateway")}
        assert reporting == {own: True, mesh.target: False}


@pytest.mark.slow
def test_a_replica_that_dies_or_hangs_is_shown_as_such_and_delays_nobody(
    mesh: Mesh, tmp_path: Path
) -> None:
    port, metrics_port = free_ports(2)
    settings = copy.deepcopy(mesh.settings)
    address = f"127.0.0.1:{port}"
    settings["cache"] |= {"listen": address, "metrics_listen": f"127.0.0.1:{metrics_port}"}
    gateway = gateway_settings(mesh)
    gateway["cache"]["target"] = f"dns:///{mesh.settings['cache']['listen']},{address}"

    def state(picture: Picture) -> monitor_pb2.ReplicaState.ValueType:
        return next(each.state for each in replicas(picture, "cache") if each.address == address)

    def problem(picture: Picture) -> str:
        return next(each.problem for each in replicas(picture, "cache") if each.address == address)

    def others_serve(picture: Picture) -> bool:
        return all(
            each.state == SERVING
            for service in picture.services
            for each in service.replicas
            if each.address != address
        )

    with beside(mesh, tmp_path, gateway) as target, Watch(target) as watch:
        with ServiceProcess("cache", tmp_path / "first", settings) as first:
            watch.until(lambda picture: state(picture) == SERVING)
            os.kill(first.pid, signal.SIGSTOP)
            hung = watch.until(lambda picture: state(picture) == UNREACHABLE)
            assert problem(hung) == "no answer within 1 s"
            assert others_serve(hung)
            seen = len(watch.times)
            time.sleep(3)
            assert len(watch.times) >= seen + 2, "a picture takes little more than a second"
            os.kill(first.pid, signal.SIGCONT)
            watch.until(lambda picture: state(picture) == SERVING)
            os.kill(first.pid, signal.SIGKILL)
            dead = watch.until(lambda picture: state(picture) == UNREACHABLE)
            assert others_serve(dead)
            refused = watch.until(lambda picture: "refused" in problem(picture).lower())
            assert state(refused) == UNREACHABLE
        with ServiceProcess("cache", tmp_path / "second", settings):
            back = watch.until(lambda picture: state(picture) == SERVING)
            assert others_serve(back)


def test_a_gateway_that_shuts_down_sends_its_watchers_away(mesh: Mesh, tmp_path: Path) -> None:
    settings = gateway_settings(mesh)
    with ServiceProcess("gateway", tmp_path / "gateway", settings) as process:
        process.wait_until_healthy()
        with grpc.insecure_channel(process.address) as channel:
            watching = mesh_pb2_grpc.MeshServiceStub(channel).WatchMesh(WATCH, timeout=60)
            next(watching)
            began = time.monotonic()
            os.kill(process.pid, signal.SIGTERM)
            with pytest.raises(grpc.RpcError) as caught:
                for _ in watching:
                    pass
        assert failure_of(caught.value).reason == "DRAINING"
        assert process.wait() == 0
        assert time.monotonic() - began < 20, "it does not wait for them"


def test_top_shows_the_mesh_on_a_small_terminal(mesh: Mesh) -> None:
    with (
        Terminal(["top", "--target", mesh.target, "--interval", "0.5"], 80, 24) as terminal,
        mesh.client() as client,
    ):
        terminal.wait_for("6 of 6 replicas serving", 60)
        for n in range(3):
            client.generate(f"Tell {n} {time.time()}", max_tokens=8)
        terminal.wait_for(mesh.target)
        terminal.press("q")
        assert terminal.wait_for_end() == 0
        last = terminal.pictures[-1]
        assert len(last) == 24
        for service in ("gateway", "tokenizer", "engine", "cache", "safety", "valkey"):
            assert any(line.startswith(f"● {service} ") for line in last), last
