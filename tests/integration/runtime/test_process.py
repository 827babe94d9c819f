"""The life of a service process: it starts or says why not, answers, drains and ends cleanly."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest
import yaml
from google.protobuf.wrappers_pb2 import StringValue
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

from meshserve.v1 import monitor_pb2, monitor_pb2_grpc
from services.runtime.errors import Reason, ServiceError
from tests.fakes.shapes import SECRET, SERVICE, ShapesStub
from tests.support.ports import free_ports

ROOT = Path(__file__).parents[3]
SERVING = health_pb2.HealthCheckResponse.SERVING
NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING


class Process:
    """The test service, started with settings of its own."""

    def __init__(self, folder: Path, environ: dict[str, str], **settings: Any) -> None:
        self.port, self.metrics_port = free_ports(2)
        section = {
            "listen": f"127.0.0.1:{self.port}",
            "metrics_listen": f"127.0.0.1:{self.metrics_port}",
            **settings,
        }
        config = folder / "mesh.yaml"
        config.write_text(yaml.safe_dump({"cache": section}))
        self.errors = folder / "stderr"
        with self.errors.open("wb") as stderr:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "tests.fakes.shapes_service", "--config", str(config)],
                stderr=stderr,
                stdout=stderr,
                cwd=ROOT,
                env={**os.environ, **environ},
            )
        self.channel = grpc.insecure_channel(f"127.0.0.1:{self.port}")
        self.stub = ShapesStub(self.channel)

    def ready(self) -> Process:
        grpc.channel_ready_future(self.channel).result(timeout=15)
        assert self.health() == SERVING
        return self

    def health(self, service: str = "") -> int:
        stub = health_pb2_grpc.HealthStub(self.channel)
        status: int = stub.Check(health_pb2.HealthCheckRequest(service=service)).status
        return status

    def signal(self, number: int) -> None:
        self.process.send_signal(number)

    def exit_code(self, within_s: float = 30.0) -> int:
        return self.process.wait(within_s)

    def output(self) -> str:
        return self.errors.read_text()

    def until_logged(self, text: str, within_s: float = 30.0) -> None:
        deadline = time.monotonic() + within_s
        while text not in self.output():
            assert time.monotonic() < deadline, self.output()
            time.sleep(0.02)

    def close(self) -> None:
        self.channel.close()
        if self.process.poll() is None:
            self.process.kill()
            self.process.wait()


Start = Callable[..., Process]


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    started: list[Process] = []

    def start_one(environ: dict[str, str] | None = None, **settings: Any) -> Process:
        folder = tmp_path / str(len(started))
        folder.mkdir()
        started.append(Process(folder, environ or {}, **settings))
        return started[-1]

    yield start_one
    for process in started:
        process.close()


def begin(process: Process, command: str) -> Any:
    """A call under way: it has sent its first answer."""
    responses = process.stub.fan_out(StringValue(value=f"echo begun;{command}"))
    assert next(responses).value == "begun"
    return responses


def test_sigterm_lets_the_call_in_flight_finish_and_takes_no_other(start: Start) -> None:
    process = start().ready()
    in_flight = begin(process, "sleep 1")
    watch = health_pb2_grpc.HealthStub(process.channel).Watch(
        health_pb2.HealthCheckRequest(service=SERVICE)
    )
    assert next(watch).status == SERVING
    process.signal(signal.SIGTERM)
    assert next(watch).status == NOT_SERVING
    assert [response.value for response in in_flight] == ["1"]
    assert process.exit_code() == 0
    assert "Traceback" not in process.output()
    with pytest.raises(grpc.RpcError):
        process.stub.unary(StringValue(value="echo hi"))


def test_sigint_ends_it_as_well(start: Start) -> None:
    process = start().ready()
    process.signal(signal.SIGINT)
    assert process.exit_code() == 0
    assert "Traceback" not in process.output()


def test_a_call_longer_than_the_drain_timeout_is_cut_and_the_exit_clean(start: Start) -> None:
    process = start(drain_timeout_s=0.5).ready()
    in_flight = begin(process, "sleep 60")
    began = time.monotonic()
    process.signal(signal.SIGTERM)
    with pytest.raises(grpc.RpcError) as caught:
        next(in_flight)
    error = ServiceError.from_rpc_error(caught.value, peer="cache")
    assert error.reason is Reason.SERVICE_UNAVAILABLE
    assert process.exit_code() == 0
    assert 0.4 < time.monotonic() - began < 30
    assert "calls in flight were cut off" in process.output()
    assert "stopped; released True" in process.output(), "the servicer must let go before the end"
    assert "Traceback" not in process.output()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_the_same_signal_again_ends_it_at_once(start: Start, number: int) -> None:
    process = start().ready()
    # Held to the end: a call that nobody holds is cancelled, and the drain would be over.
    in_flight = begin(process, "sleep 60")
    process.signal(number)
    process.until_logged("shutting down")
    process.signal(number)
    assert process.exit_code(3) == -number, in_flight
    assert "Traceback" not in process.output()


def test_a_supervisors_sigterm_after_ctrl_c_does_not_cut_the_drain(start: Start) -> None:
    process = start().ready()
    in_flight = begin(process, "sleep 0.5")
    process.signal(signal.SIGINT)
    process.until_logged("shutting down")
    process.signal(signal.SIGTERM)
    assert [response.value for response in in_flight] == ["0.5"]
    assert process.exit_code() == 0


@pytest.mark.parametrize("key", ["listen", "metrics_listen"])
def test_a_port_in_use_is_said_with_the_way_out(start: Start, key: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        process = start(**{key: address})
        assert process.exit_code() == 78
    assert address in process.output()
    assert f"set cache.{key} to another address" in process.output()
    assert "Traceback" not in process.output()


def test_the_port_of_a_running_service_is_in_use(start: Start) -> None:
    first = start().ready()
    second = start(listen=f"127.0.0.1:{first.port}")
    assert second.exit_code() == 78
    assert first.health() == SERVING


def test_a_service_that_cannot_start_says_why_and_what_to_do(start: Start) -> None:
    process = start({"SHAPES_START": "refuse"})
    assert process.exit_code() == 78
    assert "meshserve cache: the model is missing\n  pull it" in process.output()
    assert "Traceback" not in process.output()


@pytest.mark.parametrize("way", ["crash", "time_out"])
def test_a_defect_at_the_start_is_logged_and_no_clean_exit(start: Start, way: str) -> None:
    process = start({"SHAPES_START": way})
    assert process.exit_code() == 1
    records = [json.loads(line) for line in process.output().splitlines() if line[0] == "{"]
    assert [r["level"] for r in records if "exception" in r] == ["critical"]


def test_a_service_that_is_still_starting_can_be_stopped(start: Start) -> None:
    process = start({"SHAPES_START": "hang"})
    deadline = time.monotonic() + 10
    while True:  # the metrics port answers before the service has started
        try:
            with socket.create_connection(("127.0.0.1", process.metrics_port)):
                break
        except OSError:
            assert time.monotonic() < deadline
            time.sleep(0.02)
    time.sleep(0.2)
    process.signal(signal.SIGTERM)
    assert process.exit_code() == 0
    assert "stopped" in process.output()


def test_a_mistake_in_the_settings_is_said_without_a_traceback(start: Start) -> None:
    process = start(lisen="x")
    assert process.exit_code() == 78
    assert "cache.lisen: unknown key; did you mean 'listen'?" in process.output()
    assert "Traceback" not in process.output()


def test_a_probe_asks_a_service_as_it_has_noted(start: Start, tmp_path: Path) -> None:
    environ = {"MESHSERVE_PROBE_FILE": str(tmp_path / "probe")}
    start(environ).ready()
    probe = [sys.executable, "-m", "meshserve", "probe", "cache"]
    asked = subprocess.run(probe, env={**os.environ, **environ}, capture_output=True, text=True)
    assert (asked.returncode, asked.stdout) == (0, "cache is serving\n")


def test_a_place_where_nothing_can_be_noted_keeps_no_service_from_starting(start: Start) -> None:
    assert start({"MESHSERVE_PROBE_FILE": "/nowhere/probe"}).ready()


def test_health_turns_with_the_probe(start: Start, tmp_path: Path) -> None:
    sick = tmp_path / "sick"
    process = start({"SHAPES_SICK": str(sick)}).ready()
    watch = health_pb2_grpc.HealthStub(process.channel).Watch(
        health_pb2.HealthCheckRequest(service=SERVICE), timeout=20
    )
    assert next(watch).status == SERVING
    sick.touch()
    assert next(watch).status == NOT_SERVING
    assert process.health() == NOT_SERVING
    sick.unlink()
    assert next(watch).status == SERVING
    with pytest.raises(grpc.RpcError) as caught:
        process.health("no.such.Service")
    assert caught.value.code() is grpc.StatusCode.NOT_FOUND
    process.until_logged("not serving: sick")


def test_reflection_lists_what_is_served(start: Start) -> None:
    process = start().ready()
    stub = reflection_pb2_grpc.ServerReflectionStub(process.channel)
    request = reflection_pb2.ServerReflectionRequest(list_services="")
    (response,) = stub.ServerReflectionInfo(iter([request]))
    names = {service.name for service in response.list_services_response.service}
    assert {SERVICE, "grpc.health.v1.Health"} <= names


def test_a_message_that_is_too_large_is_refused_and_the_service_goes_on(start: Start) -> None:
    process = start(max_message_bytes=10_000).ready()
    with pytest.raises(grpc.RpcError) as caught:
        process.stub.unary(StringValue(value="x" * 20_000))
    assert caught.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
    error = ServiceError.from_rpc_error(caught.value, peer="cache")
    assert error.reason is Reason.MESSAGE_TOO_LARGE
    assert process.stub.unary(StringValue(value="echo on")).value == "on"
    with pytest.raises(grpc.RpcError) as caught:
        process.stub.unary(StringValue(value="large 20000"))
    assert caught.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED


def test_a_defect_in_a_servicer_is_in_the_log_and_not_in_the_answer(start: Start) -> None:
    process = start().ready()
    with pytest.raises(grpc.RpcError) as caught:
        process.stub.unary(StringValue(value="crash"))
    assert SECRET not in str(caught.value)
    process.until_logged(SECRET)
    records = [json.loads(line) for line in process.output().splitlines()]
    (record,) = [r for r in records if "exception" in r]
    assert record["service"] == "cache"
    assert record["method"] == f"{SERVICE}/Unary"


def test_metrics_are_shown_on_their_port(start: Start) -> None:
    process = start().ready()
    process.stub.unary(StringValue(value="echo hi"))
    with urllib.request.urlopen(f"http://127.0.0.1:{process.metrics_port}/metrics") as page:
        text = page.read().decode()
    assert f'meshserve_rpc_server_calls_total{{code="OK",method="{SERVICE}/Unary"}} 1.0' in text
    assert "meshserve_healthy 1.0" in text
    assert 'meshserve_build_info{service="cache"' in text


def status(process: Process) -> monitor_pb2.GetStatusResponse:
    answer = monitor_pb2_grpc.MonitorServiceStub(process.channel).GetStatus(
        monitor_pb2.GetStatusRequest(), timeout=5
    )
    assert isinstance(answer, monitor_pb2.GetStatusResponse)
    return answer


def test_a_replica_tells_what_prometheus_would_read(start: Start) -> None:
    process = start().ready()
    for _ in range(3):
        process.stub.unary(StringValue(value="sleep 0.03"))
    told = status(process)
    metrics = {metric.name: metric for metric in told.metrics}
    calls = metrics["meshserve_rpc_server_calls"]
    assert calls.kind == monitor_pb2.METRIC_KIND_COUNTER
    assert list(calls.label_names) == ["method", "code"]
    assert [(tuple(each.label_values), each.value) for each in calls.samples] == [
        ((f"{SERVICE}/Unary", "OK"), 3.0)
    ]
    durations = metrics["meshserve_rpc_server_duration_seconds"]
    by_method = {tuple(each.label_values): each for each in durations.samples}
    sample = by_method[(f"{SERVICE}/Unary",)]
    assert sum(sample.bucket_counts) == 3
    # Timers of an event loop count in whole milliseconds, and may be one early.
    assert sample.value > 3 * 0.029
    assert len(durations.bucket_bounds) == len(sample.bucket_counts)
    assert durations.bucket_bounds[-1] == float("inf")
    first = next(
        bound for bound, n in zip(durations.bucket_bounds, sample.bucket_counts, strict=True) if n
    )
    assert first >= 0.05, "a bucket holds what is above the bound before it"
    page = (
        urllib.request.urlopen(f"http://127.0.0.1:{process.metrics_port}/metrics").read().decode()
    )
    shown = {line.split(" ")[2] for line in page.splitlines() if line.startswith("# TYPE")}
    assert {name.removesuffix("_total") for name in shown} - {""} >= set(metrics)


def test_a_replica_tells_who_it_is_and_how_it_does(start: Start, tmp_path: Path) -> None:
    sick = tmp_path / "sick"
    process = start({"SHAPES_SICK": str(sick)}).ready()
    first = status(process)
    assert (first.service, first.state) == ("cache", monitor_pb2.REPLICA_STATE_SERVING)
    assert first.version
    sick.touch()
    deadline = time.monotonic() + 10
    while (told := status(process)).state != monitor_pb2.REPLICA_STATE_UNHEALTHY:
        assert time.monotonic() < deadline
        time.sleep(0.05)
    assert told.problem == "sick"
    assert told.instance_id == first.instance_id
    assert told.instance_id != status(start().ready()).instance_id


def test_a_replica_that_was_never_well_is_starting(start: Start, tmp_path: Path) -> None:
    sick = tmp_path / "sick"
    sick.touch()
    process = start({"SHAPES_SICK": str(sick)})
    grpc.channel_ready_future(process.channel).result(timeout=15)
    assert status(process).state == monitor_pb2.REPLICA_STATE_STARTING


def test_a_trace_receiver_that_is_away_delays_nothing_for_long(start: Start) -> None:
    (port,) = free_ports(1)
    process = start({"MESHSERVE_TELEMETRY__OTLP_ENDPOINT": f"http://127.0.0.1:{port}"}).ready()
    process.stub.unary(StringValue(value="echo hi"))
    began = time.monotonic()
    process.signal(signal.SIGTERM)
    assert process.exit_code() == 0
    assert time.monotonic() - began < 20, "its retries go on for a minute"
