"""Asking replicas: whatever one of them does, the others are seen."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any, cast

import grpc
import pytest
from grpc.aio import Metadata

from meshserve.v1 import mesh_pb2, monitor_pb2
from services.gateway.overview.collector import Collector
from services.gateway.overview.places import Place, Places
from services.runtime.settings import parse_settings
from services.runtime.valkey import ValkeyClient, ValkeyUnavailableError

SERVING = monitor_pb2.REPLICA_STATE_SERVING
UNREACHABLE = monitor_pb2.REPLICA_STATE_UNREACHABLE
Answer = Callable[..., Awaitable[bytes]]


def status(service: str, instance: str = "x") -> monitor_pb2.GetStatusResponse:
    return monitor_pb2.GetStatusResponse(service=service, instance_id=instance, state=SERVING)


async def answers(*_: object, **__: object) -> bytes:
    return status("cache").SerializeToString()


async def is_closed(*_: object, **__: object) -> bytes:
    raise asyncio.CancelledError


async def cannot_be_called(*_: object, **__: object) -> bytes:
    raise grpc.aio.UsageError("Channel is closed.")


async def talks_nonsense(*_: object, **__: object) -> bytes:
    return b"\xff\xff\xff"


async def is_old(*_: object, **__: object) -> bytes:
    raise failure(grpc.StatusCode.UNIMPLEMENTED, "Method not found!")


async def refuses(*_: object, **__: object) -> bytes:
    raise failure(
        grpc.StatusCode.UNAVAILABLE,
        "failed to connect to all addresses; last error: UNKNOWN: ipv4:10.0.0.1:50054: "
        "Failed to connect to remote host: Connection refused",
    )


def failure(code: grpc.StatusCode, details: str) -> grpc.aio.AioRpcError:
    return grpc.aio.AioRpcError(code, Metadata(), Metadata(), details)


class NoValkey:
    name = "redis://user@valkey:6379/0"
    is_cluster = False

    async def execute(self, *_: object) -> Any:
        raise ValkeyUnavailableError("valkey is away", retry_after_s=1)


class Found:
    """Places that are known."""

    def __init__(self, places: list[Place]) -> None:
        self.places = places

    def all(self) -> list[Place]:
        return self.places


def collector(*places: Place) -> Collector:
    settings = parse_settings({}, {})
    return Collector(
        lambda: settings,
        lambda: status("gateway", "own"),
        cast(ValkeyClient, NoValkey()),
        cast(Places, Found(list(places))),
    )


def states(mesh: mesh_pb2.MeshSnapshot, service: str) -> dict[str, tuple[int, str]]:
    return {
        each.address: (each.state, each.problem)
        for found in mesh.services
        if found.service == service
        for each in found.replicas
    }


@pytest.mark.parametrize(
    ("answer", "problem"),
    [
        (is_closed, "its connection was closed"),
        (cannot_be_called, "its connection was closed"),
        (talks_nonsense, "answers with something else; is it a replica at all?"),
        (is_old, "does not tell; is it of an older version?"),
        (refuses, "Connection refused"),
    ],
)
async def test_one_replica_keeps_nobody_from_seeing_the_others(
    answer: Answer, problem: str
) -> None:
    mesh = await collector(
        Place("cache", "10.0.0.1:50054", answer), Place("cache", "10.0.0.2:50054", answers)
    ).picture(None)
    assert states(mesh, "cache") == {
        "10.0.0.1:50054": (UNREACHABLE, problem),
        "10.0.0.2:50054": (SERVING, ""),
    }
    assert states(mesh, "gateway") == {"127.0.0.1:50051": (SERVING, "")}
    assert states(mesh, "valkey") == {"valkey:6379": (UNREACHABLE, "valkey is away")}


async def test_a_poll_that_is_given_up_ends() -> None:
    async def waits(*_: object, **__: object) -> bytes:
        await asyncio.sleep(60)
        raise AssertionError

    polling = asyncio.create_task(collector(Place("cache", "a:1", waits)).picture(None))
    await asyncio.sleep(0.05)
    polling.cancel()
    with pytest.raises(asyncio.CancelledError):
        await polling


async def test_an_operators_key_is_shown_to_gateways_alone() -> None:
    seen: dict[str, dict[str, str]] = {}

    def noting(service: str) -> Answer:
        async def answer(_: bytes, timeout: float, metadata: list[tuple[str, str]]) -> bytes:
            seen[service] = dict(metadata)
            return status(service).SerializeToString()

        return answer

    await collector(
        Place("gateway", "10.0.0.9:50051", noting("gateway")),
        Place("engine", "10.0.0.9:50053", noting("engine")),
    ).picture("Bearer key")
    assert seen["gateway"]["authorization"] == "Bearer key"
    assert "authorization" not in seen["engine"]
    assert seen["engine"]["traceparent"].endswith("-00"), "not recorded"


async def test_a_gateway_that_finds_itself_is_shown_once_by_the_address_it_is_found_at() -> None:
    async def itself(*_: object, **__: object) -> bytes:
        return status("gateway", "own").SerializeToString()

    async def another(*_: object, **__: object) -> bytes:
        return status("gateway", "other").SerializeToString()

    mesh = await collector(
        Place("gateway", "10.0.0.1:50051", itself), Place("gateway", "10.0.0.2:50051", another)
    ).picture(None)
    gateways = mesh.services[0].replicas
    assert [(each.address, each.reporting) for each in gateways] == [
        ("10.0.0.1:50051", True),
        ("10.0.0.2:50051", False),
    ]
