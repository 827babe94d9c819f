"""What a connection tells of its replica."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from services.runtime import connections
from services.runtime.replicas import Replica, ReplicaState
from tests.fakes.shapes import Shapes
from tests.support.waiting import until

SERVING = health_pb2.HealthCheckResponse.SERVING


class SaysOnce(health_pb2_grpc.HealthServicer):
    """Says that it serves, and ends the watch without another word."""

    def __init__(self) -> None:
        self.watches = 0

    async def Watch(self, request: Any, context: Any) -> AsyncIterator[Any]:
        self.watches += 1
        yield health_pb2.HealthCheckResponse(status=SERVING)


async def address_with(loopback: Any, health: SaysOnce | None) -> str:
    """Where a replica with this health service, or none, is served."""
    server = grpc.aio.server()
    Shapes().add_to(server)
    if health is not None:
        health_pb2_grpc.add_HealthServicer_to_server(health, server)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    loopback.stack.push_async_callback(server.stop, 0)
    return f"127.0.0.1:{port}"


async def replica_with(loopback: Any, health: SaysOnce | None) -> Replica:
    """A replica with this health service, or none, as its caller knows it."""
    (replica,) = loopback.channel_to(await address_with(loopback, health)).replicas
    assert isinstance(replica, Replica)
    return replica


async def test_a_replica_that_ends_the_watch_takes_nothing_until_it_says_so_again(
    loopback,
) -> None:
    """Every state is told: a word and the end of the watch may come in one piece, and who looked
    at the replica now and then would not see it serve."""
    states: list[ReplicaState] = []
    connection = connections.Connection(
        f"ipv4:{await address_with(loopback, SaysOnce())}",
        connections.channel_options(None, 1 << 20),
        credentials=None,
        health_service="",
        on_state=states.append,
        on_instance=lambda _: None,
    )
    await until(lambda: len(states) >= 4)
    connection.close()
    await connection.ended()
    assert states[:4] == [ReplicaState.SERVING, ReplicaState.NOT_SERVING] * 2


async def test_a_replica_without_a_health_service_serves_while_it_is_connected(loopback) -> None:
    replica = await replica_with(loopback, None)
    await until(lambda: replica.takes_calls)


async def test_delays_begin_anew_with_each_replica_that_answers(
    loopback, monkeypatch: pytest.MonkeyPatch
) -> None:
    """If they went on growing, the last of these would come after minutes."""
    monkeypatch.setattr(connections, "FIRST_RECONNECT_DELAY_MS", 5)
    monkeypatch.setattr(connections, "LONGEST_RECONNECT_DELAY_MS", 10**6)
    health = SaysOnce()
    await replica_with(loopback, health)
    await until(lambda: health.watches >= 16)
