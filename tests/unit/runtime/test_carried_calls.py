"""Short calls that travel together on one stream are answered as if each had one of its own."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from google.protobuf.wrappers_pb2 import StringValue
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.trace import SpanKind

from services.runtime import carrier, deadline
from services.runtime.errors import Reason, ServiceError
from tests.fakes.shapes import SECRET, Shapes, ShapesStub
from tests.support.waiting import until

CARRY = "meshserve.v1.CallService/CarryCalls"
UNARY = "test.Shapes/Unary"


async def start(loopback: Any, shapes: Shapes | None = None) -> tuple[Any, ShapesStub]:
    """A replica whose calls can be carried, and a stub that has them carried."""
    replica = await loopback.serve(shapes, draining=asyncio.Event())
    return replica, loopback.connect(replica, carries_calls=True)


async def ask(stub: ShapesStub, command: str, **options: Any) -> str:
    return str((await stub.unary(StringValue(value=command), **options)).value)


def streams(replica: Any) -> float:
    """How many streams of carried calls a replica has now."""
    value = replica.metrics.registry.get_sample_value(
        "meshserve_rpc_server_active_calls", {"method": CARRY}
    )
    return value or 0.0


def answered(replica: Any, code: str) -> float | None:
    """How many calls of the method a replica has counted."""
    value: float | None = replica.metrics.registry.get_sample_value(
        "meshserve_rpc_server_calls_total", {"method": UNARY, "code": code}
    )
    return value


async def test_calls_share_a_stream_and_each_gets_its_own_answer(loopback) -> None:
    replica, stub = await start(loopback)
    answers = await asyncio.gather(*(ask(stub, f"echo {number}") for number in range(50)))
    assert answers == [str(number) for number in range(50)]
    assert streams(replica) == 1
    assert answered(replica, "OK") == 50


async def test_a_slow_call_does_not_hold_up_the_others(loopback) -> None:
    shapes = Shapes()
    _, stub = await start(loopback, shapes)
    slow = asyncio.create_task(ask(stub, "sleep 30"))
    await shapes.began.wait()
    assert await ask(stub, "echo quick") == "quick"
    slow.cancel()


async def test_a_carried_call_leaves_the_spans_of_a_call(
    loopback, spans, provider: TracerProvider
) -> None:
    _, stub = await start(loopback)
    with provider.get_tracer("test").start_as_current_span("request") as request:
        await ask(stub, "echo a")
    await until(lambda: len(spans.of(SpanKind.SERVER)) == 1)
    for span in (spans.client, spans.server):
        assert span.name == UNARY
        assert span.context.trace_id == request.get_span_context().trace_id
        assert span.attributes["rpc.method"] == UNARY
        assert span.attributes["rpc.response.status_code"] == "OK"
    assert spans.client.parent.span_id == request.get_span_context().span_id
    assert spans.server.parent.span_id == spans.client.context.span_id


async def test_an_error_comes_back_with_its_details(loopback) -> None:
    replica, stub = await start(loopback)
    with pytest.raises(ServiceError) as caught:
        await ask(stub, "raise QUEUE_FULL")
    assert caught.value.reason is Reason.QUEUE_FULL
    assert caught.value.retry_after_s == 1.5
    assert answered(replica, "RESOURCE_EXHAUSTED") == 1


@pytest.mark.parametrize("command", ["crash", "unserializable"])
async def test_a_defect_is_internal_and_tells_nothing(loopback, command: str) -> None:
    _, stub = await start(loopback)
    with pytest.raises(ServiceError) as caught:
        await ask(stub, command)
    assert caught.value.reason is Reason.INTERNAL
    assert SECRET not in str(caught.value)
    assert await ask(stub, "echo on") == "on", "the stream goes on"


async def test_bytes_that_are_no_message_are_the_callers_mistake(loopback) -> None:
    _, stub = await start(loopback)
    with pytest.raises(ServiceError) as caught:
        await stub.unary_bytes(b"\xff\xff")
    assert caught.value.reason is Reason.MALFORMED_MESSAGE


async def test_the_deadline_travels_and_ends_both_sides(loopback) -> None:
    shapes = Shapes()
    _, stub = await start(loopback, shapes)
    deadline.set_remaining(0.5)
    with pytest.raises(ServiceError) as caught:
        await ask(stub, "sleep 30")
    assert caught.value.reason is Reason.DEADLINE_EXCEEDED
    assert caught.value.metadata == {"service": "shapes"}
    (remaining_s,) = shapes.remaining_s
    assert remaining_s is not None
    assert 0 < remaining_s <= 0.5
    await asyncio.wait_for(shapes.released.wait(), 2)


async def test_a_call_given_up_ends_in_the_servicer(loopback) -> None:
    shapes = Shapes()
    replica, stub = await start(loopback, shapes)
    asking = asyncio.create_task(ask(stub, "sleep 30"))
    await shapes.began.wait()
    asking.cancel()
    await asyncio.wait_for(shapes.released.wait(), 2)
    await until(lambda: answered(replica, "CANCELLED") == 1)


async def test_a_service_that_carries_nothing_is_called_in_the_plain_way(loopback) -> None:
    replica = await loopback.serve()
    stub = loopback.connect(replica, carries_calls=True)
    assert await ask(stub, "echo a") == "a"
    assert await ask(stub, "echo b") == "b"


async def test_a_long_request_goes_its_own_way(loopback) -> None:
    replica, stub = await start(loopback)
    text = "x" * carrier.MAX_REQUEST_BYTES
    assert await ask(stub, f"echo {text}") == text
    assert streams(replica) == 0


async def test_a_call_under_way_when_its_replica_is_killed_is_made_at_another(loopback) -> None:
    first_shapes, second_shapes = Shapes("first"), Shapes("second")
    first = await loopback.serve(first_shapes, draining=asyncio.Event())
    second = await loopback.serve(second_shapes, draining=asyncio.Event())
    stub = loopback.connect(first, second, carries_calls=True)
    asking = asyncio.create_task(ask(stub, "sleep 0.5"))
    await until(lambda: first_shapes.calls + second_shapes.calls == 1)
    await (first if first_shapes.calls else second).server.stop(0)
    await asyncio.wait_for(asking, 5)
    assert first_shapes.calls == second_shapes.calls == 1


async def test_a_replica_that_drains_ends_its_calls_and_begins_none(loopback) -> None:
    shapes, draining = Shapes("old"), asyncio.Event()
    old = await loopback.serve(shapes, draining=draining)
    stub = loopback.connect(old, carries_calls=True)
    asking = asyncio.create_task(ask(stub, "sleep 0.3"))
    await shapes.began.wait()
    draining.set()
    # In the plain way, where the channel knows which replicas serve.
    assert await ask(stub, "name") == "old"
    await asking
    await until(lambda: streams(old) == 0)
