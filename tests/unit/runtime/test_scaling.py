"""Replicas behind a name: those that come are used, those that go are not missed."""

from __future__ import annotations

import asyncio
import subprocess
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import grpc
import pytest
from google.protobuf.wrappers_pb2 import StringValue

from services.runtime import names
from services.runtime.errors import Reason, ServiceError
from services.runtime.replicas import ReplicaState
from tests.fakes.shapes import Shapes, ShapesStub
from tests.support.ports import free_ports
from tests.support.waiting import until


@pytest.fixture
def addresses(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The addresses of every name; a test changes them."""
    current: list[str] = []

    async def resolve(host: str) -> Sequence[str]:
        return list(current)

    monkeypatch.setattr(names, "resolve", resolve)
    monkeypatch.setattr(names, "LOOK_UP_INTERVAL_S", 0.02)
    return current


async def ask(stub: ShapesStub, command: str, **options: Any) -> str:
    return str((await stub.unary(StringValue(value=command), **options)).value)


class Service:
    """Replicas on 127.0.0.2 and so on, all with the same port, behind one name."""

    def __init__(self, loopback: Any, addresses: list[str], carries_calls: bool = False) -> None:
        self._loopback = loopback
        self._addresses = addresses
        (self.port,) = free_ports(1)
        self._carries_calls = carries_calls
        self.channel = loopback.channel_to(
            f"dns:///shapes.test:{self.port}", carries_calls=carries_calls
        )
        self.stub = ShapesStub(self.channel)

    async def add(self, number: int) -> Any:
        draining = asyncio.Event() if self._carries_calls else None
        host = f"127.0.0.{number}"
        replica = await self._loopback.serve(Shapes(str(number)), self.port, draining, host)
        self._addresses.append(host)
        return replica

    async def remove(self, number: int) -> None:
        self._addresses.remove(f"127.0.0.{number}")

    async def are_serving(self, *numbers: int) -> None:
        """Returns once these, and no others, take calls."""
        wanted = {f"127.0.0.{number}:{self.port}" for number in numbers}
        await until(
            lambda: (
                wanted
                == {replica.address for replica in self.channel.replicas if replica.takes_calls}
            )
        )

    async def spread(self, calls: int = 30) -> Counter[str]:
        return Counter([await ask(self.stub, "name") for _ in range(calls)])


@pytest.mark.parametrize("carries_calls", [False, True])
async def test_a_replica_that_is_added_to_the_name_gets_its_share(
    loopback, addresses: list[str], carries_calls: bool
) -> None:
    service = Service(loopback, addresses, carries_calls)
    await service.add(2)
    await service.are_serving(2)
    assert await service.spread() == {"2": 30}
    await service.add(3)
    await service.add(4)
    await service.are_serving(2, 3, 4)
    assert await service.spread() == {"2": 10, "3": 10, "4": 10}


async def test_a_replica_that_leaves_the_name_ends_what_it_has_and_gets_no_more(
    loopback, addresses: list[str]
) -> None:
    service = Service(loopback, addresses)
    leaving = await service.add(2)
    await service.are_serving(2)
    begun = asyncio.create_task(ask(service.stub, "sleep 0.3"))
    await leaving.shapes.began.wait()
    await service.add(3)
    await service.remove(2)
    await service.are_serving(3)
    assert await service.spread() == {"3": 30}
    (left,) = (each for each in service.channel.replicas if each.is_leaving)
    assert (left.address, left.in_flight) == (f"127.0.0.2:{service.port}", 1)
    assert await begun == "0.3"
    assert len(service.channel.replicas) == 1


async def test_every_replica_is_replaced_without_a_call_that_fails(
    loopback, addresses: list[str]
) -> None:
    service = Service(loopback, addresses)
    old = {number: await service.add(number) for number in (2, 3)}
    await service.are_serving(2, 3)
    stop = asyncio.Event()
    answers = 0

    async def calls() -> None:
        nonlocal answers
        while not stop.is_set():
            await ask(service.stub, "sleep 0.01")
            answers += 1

    async with asyncio.TaskGroup() as group:
        for _ in range(8):
            group.create_task(calls())
        for number, replica in old.items():
            await service.add(number + 10)
            await replica.health.shut_down()
            await replica.server.stop(5)
            await service.remove(number)
        await service.are_serving(12, 13)
        before = answers
        await until(lambda: answers > before + 50)
        stop.set()


async def test_a_call_waits_for_the_first_answer_about_its_name(
    loopback, addresses: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    async def slow(host: str) -> Sequence[str]:
        await asyncio.sleep(0.6)
        return list(addresses)

    monkeypatch.setattr(names, "resolve", slow)
    service = Service(loopback, addresses)
    await service.add(2)
    assert not service.channel.replicas.is_known
    assert await ask(service.stub, "name") == "2"


async def test_a_stream_waits_for_it_too(loopback, addresses: list[str]) -> None:
    service = Service(loopback, addresses)
    await service.add(2)
    responses = service.stub.fan_out(StringValue(value="name;name"))
    assert [response.value async for response in responses] == ["2", "2"]


async def test_a_name_without_addresses_is_a_service_that_is_away(
    loopback, addresses: list[str]
) -> None:
    service = Service(loopback, addresses)
    with pytest.raises(ServiceError) as caught:
        await ask(service.stub, "name")
    assert caught.value.reason is Reason.SERVICE_UNAVAILABLE
    assert caught.value.metadata == {"service": "shapes"}


async def test_a_call_is_tried_elsewhere_without_a_pause_where_somebody_serves(
    loopback, addresses: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("services.runtime.attempts.FIRST_DELAY_S", 60.0)
    service = Service(loopback, addresses)
    refusing = await service.add(2)
    await service.add(3)
    await service.are_serving(2, 3)

    async def refuse(request: Any, context: Any) -> Any:
        refusing.shapes.calls += 1
        raise ServiceError(Reason.DRAINING, "for now")

    monkeypatch.setattr(refusing.shapes, "_obey", lambda text, context: refuse(text, context))
    async with asyncio.timeout(50):
        assert await service.spread() == {"3": 30}
    # Once it has refused a call it is passed over for a while.
    assert refusing.shapes.calls == 2


async def test_states_are_told_apart(loopback, addresses: list[str]) -> None:
    service = Service(loopback, addresses)
    replica = await service.add(2)
    (absent,) = ["127.0.0.9"]
    addresses.append(absent)

    def states() -> dict[str, ReplicaState]:
        return {each.address.partition(":")[0]: each.state for each in service.channel.replicas}

    await until(
        lambda: (
            states() == {"127.0.0.2": ReplicaState.SERVING, "127.0.0.9": ReplicaState.UNREACHABLE}
        )
    )
    await replica.health.shut_down()
    await until(lambda: states()["127.0.0.2"] is ReplicaState.NOT_SERVING)
    await replica.server.stop(0)
    await until(lambda: states()["127.0.0.2"] is ReplicaState.UNREACHABLE)


async def test_a_process_with_two_addresses_is_counted_once(loopback, addresses: list[str]) -> None:
    (port,) = free_ports(1)
    await loopback.serve(port=port, host="0.0.0.0")
    addresses += ["127.0.0.2", "127.0.0.3"]
    target = f"dns:///shapes.test:{port}"
    channel = loopback.channel_to(target)

    def counted(state: str) -> float | None:
        labels = {"peer": "shapes", "target": target, "state": state}
        return loopback.metrics.registry.get_sample_value("meshserve_rpc_client_replicas", labels)

    await until(lambda: [each.takes_calls for each in channel.replicas] == [True, True])
    assert (counted("serving"), counted("unreachable")) == (1, 0)
    await channel.close()
    assert counted("serving") is None


async def test_nothing_is_counted_of_a_service_that_may_be_away_until_it_serves(
    loopback, addresses: list[str]
) -> None:
    service = Service(loopback, addresses)
    away = f"ipv4:127.0.0.2:{service.port}"
    channel = loopback.channel_to(away, may_be_away=True)

    def counted() -> dict[str, float]:
        (family,) = (
            family
            for family in loopback.metrics.registry.collect()
            if family.name == "meshserve_rpc_client_replicas"
        )
        return {
            sample.labels["state"]: sample.value
            for sample in family.samples
            if sample.labels["target"] == away
        }

    await until(lambda: [each.state for each in channel.replicas] == [ReplicaState.UNREACHABLE])
    assert counted() == {}
    await service.add(2)
    await until(lambda: counted().get("serving") == 1)


async def test_one_replica_can_be_called_whatever_it_says(loopback, addresses: list[str]) -> None:
    service = Service(loopback, addresses)
    await service.add(2)
    draining = await service.add(3)
    await service.are_serving(2, 3)
    await draining.health.shut_down()
    await service.are_serving(2)
    (replica,) = (each for each in service.channel.replicas if not each.takes_calls)
    assert await ask(ShapesStub(service.channel.at(replica)), "name") == "3"


async def test_a_unix_socket_is_one_replica(loopback, tmp_path: Path) -> None:
    server = grpc.aio.server()
    Shapes("socket").add_to(server)
    server.add_insecure_port(f"unix:{tmp_path}/mesh.sock")
    await server.start()
    stub = ShapesStub(loopback.channel_to(f"unix:{tmp_path}/mesh.sock"))
    assert await ask(stub, "name") == "socket"
    await server.stop(0)


async def test_ipv6_is_an_address_as_any_other(loopback, addresses: list[str]) -> None:
    (port,) = free_ports(1)
    await loopback.serve(Shapes("six"), port, None, "[::1]")
    assert await ask(ShapesStub(loopback.channel_to(f"[::1]:{port}")), "name") == "six"
    addresses.append("::1")
    assert await ask(ShapesStub(loopback.channel_to(f"shapes.test:{port}")), "name") == "six"


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> tuple[bytes, bytes]:
    """Key and certificate of shapes.test."""
    directory = tmp_path_factory.mktemp("tls")
    command = (
        "openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes -days 2 "
        "-subj /CN=shapes.test -addext subjectAltName=DNS:shapes.test "
        f"-keyout {directory}/key.pem -out {directory}/certificate.pem"
    )
    subprocess.run(command.split(), check=True, capture_output=True)
    return (directory / "key.pem").read_bytes(), (directory / "certificate.pem").read_bytes()


async def test_a_certificate_must_be_for_the_name_that_a_replica_was_found_by(
    loopback, addresses: list[str], certificate: tuple[bytes, bytes]
) -> None:
    server = grpc.aio.server()
    Shapes("tls").add_to(server)
    port = server.add_secure_port("127.0.0.1:0", grpc.ssl_server_credentials([certificate]))
    await server.start()
    loopback.stack.push_async_callback(server.stop, 0)
    addresses.append("127.0.0.1")

    def stub(name: str) -> ShapesStub:
        trusted = grpc.ssl_channel_credentials(certificate[1])
        return ShapesStub(loopback.channel_to(f"{name}:{port}", credentials=trusted))

    assert await ask(stub("shapes.test"), "name") == "tls"
    with pytest.raises(ServiceError) as caught:
        await ask(stub("other.test"), "name")
    assert caught.value.reason is Reason.SERVICE_UNAVAILABLE


async def test_a_retried_call_is_one_call_in_traces_and_metrics(
    loopback, addresses: list[str], spans, counted
) -> None:
    service = Service(loopback, addresses)
    first, second = await service.add(2), await service.add(3)
    await service.are_serving(2, 3)
    asking = asyncio.create_task(ask(service.stub, "sleep 0.4"))
    await until(lambda: first.shapes.calls + second.shapes.calls == 1)
    asked_first = {first.shapes.calls: "127.0.0.2", second.shapes.calls: "127.0.0.3"}[1]
    await (first if first.shapes.calls else second).server.stop(0)
    assert await asking == "0.4"
    span = spans.client
    assert span.attributes["server.address"] == (
        "127.0.0.3" if asked_first == "127.0.0.2" else "127.0.0.2"
    )
    (event,) = span.events
    assert event.name == "retried"
    assert event.attributes["server.address"] == asked_first
    assert event.attributes["error.type"] == "SERVICE_UNAVAILABLE"
    assert counted(loopback.metrics, "client", "Unary", "OK") == 1
