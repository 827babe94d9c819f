"""A channel stands for all replicas: balanced, health-checked, retried where it does no harm."""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import AsyncIterator, Awaitable
from typing import Any

import grpc
import pytest
from google.protobuf.wrappers_pb2 import StringValue
from grpc_health.v1 import health_pb2, health_pb2_grpc

from services.runtime import connections
from services.runtime.errors import Reason, ServiceError
from services.runtime.health import NOT_SERVING, SERVING
from services.runtime.reasons import REASONS
from tests.fakes.shapes import SERVICE, Shapes, ShapesStub
from tests.support.waiting import until


async def ask(stub: ShapesStub, command: str, **options: Any) -> str:
    return str((await stub.unary(StringValue(value=command), **options)).value)


async def ready(stub: ShapesStub, names: set[str]) -> None:
    """Returns once all these replicas, and no others, answer."""
    async with asyncio.timeout(30):
        while {await ask(stub, "name") for _ in range(3 * len(names))} != names:
            await asyncio.sleep(0.01)


async def test_calls_are_spread_evenly_over_the_replicas(loopback) -> None:
    replicas = [await loopback.serve(Shapes(name)) for name in "abc"]
    stub = loopback.connect(*replicas)
    await ready(stub, set("abc"))
    counts = Counter([await ask(stub, "name") for _ in range(60)])
    assert counts == {"a": 20, "b": 20, "c": 20}


async def test_a_replica_that_is_not_serving_is_passed_over_and_comes_back(loopback) -> None:
    first, second = [await loopback.serve(Shapes(name)) for name in "ab"]
    stub = loopback.connect(first, second)
    await ready(stub, {"a", "b"})
    second.health.servicer.set([SERVICE], NOT_SERVING)
    await ready(stub, {"a"})
    assert {await ask(stub, "name") for _ in range(20)} == {"a"}
    second.health.servicer.set([SERVICE], SERVING)
    await ready(stub, {"a", "b"})


async def test_a_call_begun_goes_on_when_its_replica_stops_serving(loopback) -> None:
    replica = await loopback.serve()
    stub = loopback.connect(replica)
    task = asyncio.create_task(ask(stub, "sleep 0.3"))
    await replica.shapes.began.wait()
    replica.health.servicer.set([SERVICE], NOT_SERVING)
    assert await task == "0.3"


class Failing(Shapes):
    """Fails so many times before it answers."""

    def __init__(self, reason: Reason, times: int) -> None:
        super().__init__()
        self.reason, self.times = reason, times

    async def unary(self, request: Any, context: Any) -> Any:
        self.calls += 1
        if self.calls <= self.times:
            raise ServiceError(self.reason, "for now")
        return StringValue(value="at last")


async def test_unavailable_is_tried_again(loopback) -> None:
    replica = await loopback.serve(Failing(Reason.DRAINING, 2))
    assert await ask(loopback.connect(replica), "x") == "at last"
    assert replica.shapes.calls == 3


async def test_unavailable_is_not_tried_for_ever(loopback) -> None:
    replica = await loopback.serve(Failing(Reason.DRAINING, 99))
    with pytest.raises(ServiceError) as caught:
        await ask(loopback.connect(replica), "x")
    assert caught.value.reason is Reason.DRAINING
    assert replica.shapes.calls == 4


RETRIED = {reason for reason, entry in REASONS.items() if entry.code is grpc.StatusCode.UNAVAILABLE}


@pytest.mark.parametrize("reason", sorted(set(Reason) - RETRIED))
async def test_nothing_else_is_tried_again(reason: Reason, loopback) -> None:
    replica = await loopback.serve(Failing(reason, 1))
    with pytest.raises(ServiceError) as caught:
        await ask(loopback.connect(replica), "x")
    assert caught.value.reason is reason
    assert replica.shapes.calls == 1


async def test_a_stream_is_not_tried_again_once_it_has_answered(loopback) -> None:
    replica = await loopback.serve()
    stub = loopback.connect(replica)
    responses = stub.fan_out(StringValue(value="echo a;raise DRAINING"))
    assert (await anext(responses)).value == "a"
    with pytest.raises(ServiceError):
        await anext(responses)
    assert replica.shapes.calls == 1


async def test_a_stream_is_tried_again_before_its_first_message(loopback) -> None:
    replica = await loopback.serve()
    stub = loopback.connect(replica)
    with pytest.raises(ServiceError):
        await anext(stub.fan_out(StringValue(value="raise DRAINING")))
    assert replica.shapes.calls == 4


@pytest.mark.parametrize("shape", ["collect", "exchange"])
async def test_a_stream_of_requests_is_not_tried_again(shape: str, loopback) -> None:
    replica = await loopback.serve()
    call = getattr(loopback.connect(replica), shape)

    async def requests() -> AsyncIterator[StringValue]:
        yield StringValue(value="raise DRAINING")

    answer = call(requests())
    with pytest.raises(ServiceError) as caught:
        await (answer if shape == "collect" else anext(answer))
    assert caught.value.reason is Reason.DRAINING
    assert replica.shapes.calls == 1


async def test_a_dead_replica_costs_no_call_while_another_lives(loopback) -> None:
    first, second = [await loopback.serve(Shapes(name)) for name in "ab"]
    stub = loopback.connect(first, second)
    await ready(stub, {"a", "b"})
    await first.server.stop(0)
    assert {await ask(stub, "name") for _ in range(20)} == {"b"}


async def test_a_restarted_replica_is_found_soon_however_long_it_was_away(
    loopback, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Delays between attempts stop growing, here at 50 ms."""
    monkeypatch.setattr(connections, "FIRST_RECONNECT_DELAY_MS", 20)
    monkeypatch.setattr(connections, "LONGEST_RECONNECT_DELAY_MS", 50)
    replica = await loopback.serve(Shapes("old"))
    channel = loopback.channel(replica)
    stub = ShapesStub(channel)
    assert await ask(stub, "name") == "old"
    await replica.server.stop(0)
    with pytest.raises(ServiceError) as caught:
        await ask(stub, "name")
    assert caught.value.reason is Reason.SERVICE_UNAVAILABLE
    (known,) = channel.replicas
    away_s = await seconds(asyncio.sleep(1.4))
    await loopback.serve(Shapes("new"), port=replica.port)
    assert await seconds(until(lambda: known.takes_calls)) < away_s / 2
    assert await ask(stub, "name") == "new"


async def seconds(work: Awaitable[object]) -> float:
    """How long something takes."""
    began = time.monotonic()
    await work
    return time.monotonic() - began


async def test_a_call_cut_off_by_a_stopping_peer_is_unavailable_not_cancelled(loopback) -> None:
    replica = await loopback.serve()
    stub = loopback.connect(replica)
    responses = stub.fan_out(StringValue(value="echo a;sleep 60"))
    await anext(responses)
    await replica.server.stop(0)
    with pytest.raises(ServiceError) as caught:
        await anext(responses)
    assert caught.value.reason is Reason.SERVICE_UNAVAILABLE
    async with asyncio.timeout(30):
        await replica.shapes.released.wait()


async def test_nobody_there_is_a_service_error_that_names_the_peer(loopback) -> None:
    replica = await loopback.serve()
    await replica.server.stop(0)
    with pytest.raises(ServiceError) as caught:
        await ask(loopback.connect(replica), "name")
    assert caught.value.reason is Reason.SERVICE_UNAVAILABLE
    assert caught.value.metadata == {"service": "shapes"}
    assert caught.value.retry_after_s == 1.0


async def test_watchers_of_health_do_not_hold_up_a_shutdown(loopback) -> None:
    replica = await loopback.serve()
    stub = loopback.connect(replica)
    await ask(stub, "name")
    async with grpc.aio.insecure_channel(f"127.0.0.1:{replica.port}") as channel:
        watch = health_pb2_grpc.HealthStub(channel).Watch(
            health_pb2.HealthCheckRequest(service=SERVICE)
        )
        statuses = aiter(watch)
        seen = [(await anext(statuses)).status]
        await replica.health.shut_down()
        started = time.monotonic()
        await replica.server.stop(60)
        assert time.monotonic() - started < 20
        seen += [response.status async for response in statuses]
    assert seen == [SERVING, NOT_SERVING]
