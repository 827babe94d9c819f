"""The stack of deploy/compose.yaml on a real Docker engine: it answers, scales, heals and is
replaced, all under load."""

from __future__ import annotations

import secrets
import time
from collections.abc import Iterator

import pytest

import meshserve
from tests.compose.stack import SERVICES, STARTED, Stack
from tests.support.load import Load
from tests.support.waiting import wait_until

pytestmark = [pytest.mark.docker, pytest.mark.timeout(3000)]

REPLICAS = {"engine": 3, "tokenizer": 2}
# Steps that an engine has computed; only what is used computes any.
ENGINE_STEPS = "meshserve_engine_steps_total"


@pytest.fixture(autouse=True)
def show_logs_of_a_failure(stack: Stack, request: pytest.FixtureRequest) -> Iterator[None]:
    before = request.session.testsfailed
    yield
    if request.session.testsfailed > before:
        print(stack.logs())


def test_the_published_port_answers(stack: Stack) -> None:
    with stack.client(timeout=60) as client:
        assert "Paris" in client.chat("What is the capital of France?", temperature=0).text


def test_the_console_is_published_beside_it(stack: Stack) -> None:
    assert stack.page("/") == (200, "text/html")
    assert stack.page("/readyz")[0] == 200


def test_a_request_is_one_trace_over_all_services(stack: Stack) -> None:
    trace_id = secrets.token_hex(16)
    parent = f"00-{trace_id}-{secrets.token_hex(8)}-01"
    with stack.client(timeout=60) as client:
        client.chat(
            f"Say {trace_id}.", max_tokens=4, temperature=0, metadata={"traceparent": parent}
        )

    def services() -> set[str]:
        return {span["service"].removeprefix("meshserve-") for span in stack.trace(trace_id)}

    wait_until(lambda: len(services()) == len(SERVICES), "spans of all services")
    assert services() == set(SERVICES)
    spans = {span["id"] for span in stack.trace(trace_id)}
    orphans = [span for span in stack.trace(trace_id) if span["parent"] not in spans]
    assert [span["parent"] for span in orphans] == [parent.split("-")[2]]


def test_an_answer_is_kept_and_found_again(stack: Stack) -> None:
    with stack.client(timeout=60) as client:
        first = client.chat("Name a colour.", max_tokens=4, temperature=0, cache=True)
        second = client.chat("Name a colour.", max_tokens=4, temperature=0, cache=True)
    assert (first.cached, second.cached, second.text) == (False, True, first.text)


def test_engines_and_tokenizers_are_added_under_load(stack: Stack) -> None:
    with Load(lambda: stack.client(timeout=60)) as load:
        load.wait_for_more()
        stack.up(**REPLICAS)
        stack.wait_until_healthy()
        wait_until(lambda: len(_engines_at_work(stack)) == 3, "all engines are at work", 90)
        load.wait_for_more()
    assert not load.failures, load.failures[:5]
    assert len(stack.containers("tokenizer")) == 2
    print(f"{load.answered} answers")


def test_prometheus_finds_every_replica(stack: Stack) -> None:
    stack.up(**REPLICAS)
    wanted = {name: REPLICAS.get(name, 1) for name in (*SERVICES, "collector", "prometheus")}

    def found() -> dict[str, int]:
        up = stack.query("sum by (job) (up)")
        return {each["metric"]["job"]: int(float(each["value"][1])) for each in up}

    wait_until(lambda: wanted == found(), "all targets are up", 90)
    assert not stack.query("up == 0")


def test_prometheus_knows_what_the_collector_was_sent(stack: Stack) -> None:
    taken = 'otelcol_receiver_accepted_spans_total{job="collector"} > 0'
    wait_until(lambda: stack.query(taken), "the collector has counted spans", 60)
    (lost,) = [alert for alert in stack.alerts() if alert["name"] == "MeshServeSpansLost"]
    assert (lost["health"], lost["state"]) == ("ok", "inactive"), lost


def test_engines_and_tokenizers_are_taken_away_under_load(stack: Stack) -> None:
    stack.up(**REPLICAS)
    stack.wait_until_healthy()
    with Load(lambda: stack.client(timeout=60)) as load:
        load.wait_for_more()
        stack.up(engine=1, tokenizer=1)
        load.wait_for_more()
    assert not load.failures, load.failures[:5]
    assert len(stack.containers("engine")) == 1


@pytest.mark.parametrize("victim", SERVICES)
def test_a_killed_service_is_started_again(stack: Stack, victim: str) -> None:
    (container,) = stack.containers(victim)
    restarts = stack.restarts(container)
    with Load(lambda: stack.client(timeout=60)) as load:
        load.wait_for_more()
        stack.kill_process(container, f"services.{victim}")
        wait_until(lambda: stack.restarts(container) > restarts, f"{victim} comes back", 60)
        stack.wait_until_healthy()
        load.wait_for_more()
    assert all(isinstance(error, meshserve.ServiceUnavailableError) for error in load.failures)
    assert not load.truncated, "a failed stream looked like a finished one"
    print(f"{victim}: {load.answered} answers, {len(load.failures)} failures {load.failures[:1]}")


def test_requests_do_not_need_valkey(stack: Stack) -> None:
    with Load(lambda: stack.client(timeout=60)) as load:
        load.wait_for_more()
        stack.compose("restart", "valkey")
        stack.wait_until_healthy()
        load.wait_for_more()
    assert not load.failures, load.failures[:5]


@pytest.mark.parametrize("service", SERVICES)
def test_a_service_is_replaced_under_load(stack: Stack, service: str) -> None:
    before = set(stack.containers(service))
    with Load(lambda: stack.client(timeout=60)) as load:
        load.wait_for_more()
        stack.roll(service)
        load.wait_for_more()
    assert not load.failures, load.failures[:5]
    assert not before & set(stack.containers(service))
    print(f"{service}: {load.answered} answers")


def test_started_again_nothing_is_pulled_again(stack: Stack) -> None:
    stack.compose("stop")
    started = time.monotonic()
    stack.up()
    with stack.client(timeout=60) as client:
        wait_until(lambda: stack.is_healthy("gateway"), "the gateway is well", 120)
        client.chat("Hello.", max_tokens=1, cache=False)
    print(f"{time.monotonic() - started:.1f} s from `up` to the first token")
    assert "downloading" not in stack.compose("logs", "--no-color", "--tail=1", "model")


def test_no_container_is_more_than_it_was_declared(stack: Stack) -> None:
    for service in STARTED:
        for container in stack.containers(service):
            host = stack.inspect(container)["HostConfig"]
            assert host["ReadonlyRootfs"], service
            assert host["CapDrop"] == ["ALL"], service


def _engines_at_work(stack: Stack) -> set[str]:
    series = stack.query(f"rate({ENGINE_STEPS}[1m]) > 0")
    return {each["metric"]["instance"] for each in series}
