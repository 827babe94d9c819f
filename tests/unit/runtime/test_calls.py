"""Around every call, whatever its shape: one span a side, one status, one count, nothing leaked."""

from __future__ import annotations

import asyncio
import gc
import logging
from collections.abc import AsyncIterator
from typing import Any

import pytest
from google.protobuf.struct_pb2 import Struct
from google.protobuf.wrappers_pb2 import StringValue
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.trace import SpanKind, StatusCode
from prometheus_client import generate_latest

from services.runtime import deadline
from services.runtime.errors import Reason, ServiceError
from tests.fakes.shapes import SECRET, Shapes, ShapesStub
from tests.support.waiting import until

SHAPES = {"unary": "Unary", "fan_out": "FanOut", "collect": "Collect", "exchange": "Exchange"}


async def each(*commands: str) -> AsyncIterator[StringValue]:
    for command in commands:
        yield StringValue(value=command)


async def call(stub: ShapesStub, shape: str, *commands: str, **options: Any) -> list[str]:
    """The answers to commands, sent in the way of a shape."""
    method = getattr(stub, shape)
    if shape == "unary":
        return [(await method(StringValue(value=commands[0]), **options)).value]
    if shape == "collect":
        return [(await method(each(*commands), **options)).value]
    request = StringValue(value=";".join(commands)) if shape == "fan_out" else each(*commands)
    async with method(request, **options) as responses:
        return [response.value async for response in responses]


@pytest.mark.parametrize("shape", SHAPES)
async def test_a_call_is_one_span_on_each_side_under_the_callers_span(
    shape: str, loopback, spans, counted, provider: TracerProvider
) -> None:
    replica = await loopback.serve()
    stub = loopback.connect(replica)
    with provider.get_tracer("test").start_as_current_span("request") as request:
        await call(stub, shape, "echo a", "echo b")
    await until(lambda: len(spans.of(SpanKind.SERVER)) == 1)
    for span in (spans.client, spans.server):
        assert span.name == f"test.Shapes/{SHAPES[shape]}"
        assert span.context.trace_id == request.get_span_context().trace_id
        assert span.attributes["rpc.system.name"] == "grpc"
        assert span.attributes["rpc.method"] == span.name
        assert span.attributes["rpc.response.status_code"] == "OK"
        assert "error.type" not in span.attributes
        assert span.status.status_code is StatusCode.UNSET
    assert spans.client.parent.span_id == request.get_span_context().span_id
    assert spans.server.parent.span_id == spans.client.context.span_id
    assert spans.client.attributes["server.address"] == "127.0.0.1"
    assert spans.client.attributes["server.port"] == replica.port
    assert counted(replica.metrics, "server", SHAPES[shape], "OK") == 1
    assert counted(loopback.metrics, "client", SHAPES[shape], "OK") == 1


@pytest.mark.parametrize("shape", SHAPES)
async def test_a_service_error_reaches_the_caller_whole(
    shape: str, loopback, spans, counted
) -> None:
    replica = await loopback.serve()
    stub = loopback.connect(replica)
    with pytest.raises(ServiceError) as caught:
        await call(stub, shape, "raise RATE_LIMITED")
    assert caught.value.reason is Reason.RATE_LIMITED
    assert caught.value.message == "as asked"
    assert caught.value.retry_after_s == 1.5
    await until(lambda: len(spans.of(SpanKind.SERVER)) == 1)
    for span in (spans.client, spans.server):
        assert span.status.status_code is StatusCode.ERROR
        assert span.attributes["error.type"] == "RATE_LIMITED"
        assert span.attributes["rpc.response.status_code"] == "RESOURCE_EXHAUSTED"
    assert counted(replica.metrics, "server", SHAPES[shape], "RESOURCE_EXHAUSTED") == 1
    assert counted(loopback.metrics, "client", SHAPES[shape], "RESOURCE_EXHAUSTED") == 1


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("command", ["crash", "unserializable"])
async def test_any_other_exception_is_internal_and_tells_nothing(
    shape: str, command: str, loopback, spans, caplog: pytest.LogCaptureFixture
) -> None:
    if (shape, command) == ("collect", "unserializable"):
        command = "crash"
    stub = loopback.connect(await loopback.serve())
    with caplog.at_level(logging.ERROR), pytest.raises(ServiceError) as caught:
        await call(stub, shape, command)
    assert caught.value.reason is Reason.INTERNAL
    assert SECRET not in repr(vars(caught.value))
    assert "hunter2" not in caught.value.message
    await until(lambda: len(spans.of(SpanKind.SERVER)) == 1)
    assert spans.server.attributes["error.type"] == "INTERNAL"
    assert any(record.exc_info for record in caplog.records), "the log must hold the traceback"


@pytest.mark.parametrize("shape", ["fan_out", "exchange"])
async def test_a_stream_that_fails_in_the_middle_gives_what_came_before(
    shape: str, loopback, spans
) -> None:
    stub = loopback.connect(await loopback.serve())
    commands = ("echo a", "echo b", "raise SEQUENCE_FAILED")
    request = StringValue(value=";".join(commands)) if shape == "fan_out" else each(*commands)
    responses = getattr(stub, shape)(request)
    assert [(await anext(responses)).value for _ in range(2)] == ["a", "b"]
    with pytest.raises(ServiceError) as caught:
        await anext(responses)
    assert caught.value.reason is Reason.SEQUENCE_FAILED
    await until(lambda: len(spans.of(SpanKind.SERVER)) == 1)
    assert spans.client.attributes["error.type"] == "SEQUENCE_FAILED"
    assert spans.server.attributes["error.type"] == "SEQUENCE_FAILED"


@pytest.mark.parametrize("shape", SHAPES)
async def test_a_status_that_the_servicer_gave_itself_is_recorded_as_it_was(
    shape: str, loopback, spans, counted
) -> None:
    replica = await loopback.serve()
    stub = loopback.connect(replica)
    with pytest.raises(ServiceError):
        await call(stub, shape, "abort")
    await until(lambda: len(spans.of(SpanKind.SERVER)) == 1)
    assert spans.server.attributes["rpc.response.status_code"] == "NOT_FOUND"
    assert spans.server.status.status_code is StatusCode.ERROR
    assert counted(replica.metrics, "server", SHAPES[shape], "NOT_FOUND") == 1


async def test_a_code_that_is_set_and_not_raised_is_recorded_as_well(loopback, spans) -> None:
    stub = loopback.connect(await loopback.serve())
    with pytest.raises(ServiceError):
        await call(stub, "unary", "set_code")
    await until(lambda: len(spans.of(SpanKind.SERVER)) == 1)
    assert spans.server.attributes["rpc.response.status_code"] == "DATA_LOSS"


INVALID_UTF8 = b"\x0a\x02\xff\xfe"
TRUNCATED = b"\x0a\x10abc"


@pytest.mark.parametrize("payload", [INVALID_UTF8, TRUNCATED], ids=["not-utf8", "truncated"])
@pytest.mark.parametrize("shape", ["unary", "exchange"])
async def test_bytes_that_are_no_message_are_the_callers_mistake(
    shape: str, payload: bytes, loopback, spans
) -> None:
    replica = await loopback.serve()
    stub = loopback.connect(replica)

    async def payloads() -> AsyncIterator[bytes]:
        yield payload

    async def send() -> None:
        if shape == "unary":
            await stub.unary_bytes(payload)
        else:
            await anext(stub.exchange_bytes(payloads()))

    with pytest.raises(ServiceError) as caught:
        await send()
    assert caught.value.reason is Reason.MALFORMED_MESSAGE
    assert await call(stub, "unary", "echo still here") == ["still here"]


@pytest.mark.parametrize("shape", SHAPES)
async def test_a_caller_that_goes_away_frees_what_the_servicer_holds(
    shape: str, loopback, spans, counted
) -> None:
    replica = await loopback.serve()
    task = asyncio.create_task(call(loopback.connect(replica), shape, "sleep 60"))
    await replica.shapes.began.wait()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    async with asyncio.timeout(1):
        await replica.shapes.released.wait()
    await until(lambda: len(spans.of(SpanKind.SERVER)) == 1)
    for span in (spans.client, spans.server):
        assert span.attributes["rpc.response.status_code"] == "CANCELLED"
        # To change one's mind is no failure.
        assert span.status.status_code is StatusCode.UNSET
        assert "error.type" not in span.attributes
    assert counted(replica.metrics, "server", SHAPES[shape], "CANCELLED") == 1
    await replica.calls.ended(1.0)


async def test_a_servicer_left_between_two_messages_is_released_at_once(loopback, spans) -> None:
    # The answers fill the transport's window, so that the servicer waits at a `yield`.
    replica = await loopback.serve()
    stub = loopback.connect(replica)
    commands = ";".join(["large 1000000"] * 50)
    async with stub.fan_out(StringValue(value=commands)) as responses:
        await anext(responses)
    async with asyncio.timeout(1):
        await replica.shapes.released.wait()
    await until(lambda: len(spans.of(SpanKind.SERVER)) == 1)
    assert spans.server.attributes["rpc.response.status_code"] == "CANCELLED"


async def test_leaving_a_response_stream_early_ends_the_call_and_its_spans(loopback, spans) -> None:
    replica = await loopback.serve()
    stub = loopback.connect(replica)
    async with stub.fan_out(StringValue(value="echo a;sleep 60")) as responses:
        async for response in responses:
            assert response.value == "a"
            break
    assert spans.client.attributes["rpc.response.status_code"] == "CANCELLED"
    async with asyncio.timeout(1):
        await replica.shapes.released.wait()
    await until(lambda: len(spans.of(SpanKind.SERVER)) == 1)


async def test_a_stream_dropped_without_a_word_ends_as_well(loopback, spans) -> None:
    replica = await loopback.serve()
    stub = loopback.connect(replica)
    async for _ in stub.fan_out(StringValue(value="echo a;sleep 60")):
        break
    gc.collect()
    async with asyncio.timeout(1):
        await replica.shapes.released.wait()
    assert spans.client.attributes["rpc.response.status_code"] == "CANCELLED"


@pytest.mark.parametrize("shape", SHAPES)
async def test_a_deadline_that_passes_is_one_on_both_sides(
    shape: str, loopback, spans, counted
) -> None:
    replica = await loopback.serve()
    stub = loopback.connect(replica)
    with pytest.raises(ServiceError) as caught:
        await call(stub, shape, "sleep 60", timeout=0.15)
    assert caught.value.reason is Reason.DEADLINE_EXCEEDED
    await until(lambda: len(spans.of(SpanKind.SERVER)) == 1)
    for span in (spans.client, spans.server):
        assert span.attributes["rpc.response.status_code"] == "DEADLINE_EXCEEDED"
        assert span.attributes["error.type"] == "DEADLINE_EXCEEDED"
    assert counted(replica.metrics, "server", SHAPES[shape], "DEADLINE_EXCEEDED") == 1


async def test_each_hop_gets_what_remains_of_the_deadline(loopback, spans) -> None:
    last = await loopback.serve()
    middle = await loopback.serve(Shapes(peer=loopback.connect(last)))
    stub = loopback.connect(middle)
    deadline.set_remaining(5.0)
    await call(stub, "unary", "peer echo hi", timeout=20.0)
    (at_middle,), (at_last,) = middle.shapes.remaining_s, last.shapes.remaining_s
    assert at_middle is not None
    assert at_last is not None
    assert at_last <= at_middle - 0.04
    # gRPC sends a timeout in whole units of its own, rounded up.
    assert at_middle <= 5.1
    assert at_last > 3.0


async def test_a_deadline_that_has_passed_already_sends_nothing(loopback) -> None:
    replica = await loopback.serve()
    stub = loopback.connect(replica)
    deadline.set_remaining(0.0)
    with pytest.raises(ServiceError) as caught:
        await call(stub, "unary", "echo hi")
    assert caught.value.reason is Reason.DEADLINE_EXCEEDED
    assert replica.shapes.calls == 0


async def test_without_a_deadline_none_is_made_up(loopback) -> None:
    replica = await loopback.serve()
    await call(loopback.connect(replica), "unary", "echo hi")
    assert replica.shapes.remaining_s == [None]


async def test_two_hops_are_one_trace_parent_by_parent(loopback, spans) -> None:
    last = await loopback.serve()
    middle = await loopback.serve(Shapes(peer=loopback.connect(last)))
    stub = loopback.connect(middle)
    # The second call is made inside an async generator, after a message has been sent.
    assert await call(stub, "fan_out", "echo a", "peer echo b") == ["a", "b"]
    await until(lambda: len(spans.exporter.get_finished_spans()) == 4)
    by_id = {span.context.span_id: span for span in spans.exporter.get_finished_spans()}
    (leaf,) = [s for s in spans.of(SpanKind.SERVER) if s.name.endswith("Unary")]
    path = [leaf]
    while path[-1].parent is not None:
        path.append(by_id[path[-1].parent.span_id])
    assert [(s.kind.name, s.name.rpartition("/")[2]) for s in path] == [
        ("SERVER", "Unary"),
        ("CLIENT", "Unary"),
        ("SERVER", "FanOut"),
        ("CLIENT", "FanOut"),
    ]


async def test_concurrent_calls_keep_their_own_traces(loopback, spans, provider) -> None:
    last = await loopback.serve()
    stub = loopback.connect(await loopback.serve(Shapes(peer=loopback.connect(last))))

    async def one(index: int) -> None:
        with provider.get_tracer("test").start_as_current_span(f"request {index}"):
            await call(stub, "fan_out", *["peer echo x"] * 3)

    await asyncio.gather(*(one(index) for index in range(8)))
    await until(lambda: len(spans.of(SpanKind.SERVER)) == 8 + 24)
    traces: dict[int, int] = {}
    for span in spans.exporter.get_finished_spans():
        traces[span.context.trace_id] = traces.get(span.context.trace_id, 0) + 1
    assert sorted(traces.values()) == [9] * 8


async def test_a_standing_stream_has_no_span_and_no_deadline(loopback, spans) -> None:
    replica = await loopback.serve()
    stub = loopback.connect(replica)
    deadline.set_remaining(0.05)
    async with stub.exchange(standing=True) as stream:
        await asyncio.sleep(0.1)
        await stream.write(StringValue(value="echo late"))
        assert (await anext(stream)).value == "late"
    assert replica.shapes.remaining_s == [None]
    await replica.calls.ended(1.0)
    assert spans.exporter.get_finished_spans() == ()


async def test_writing_to_a_stream_that_has_ended_is_a_service_error(loopback) -> None:
    stub = loopback.connect(await loopback.serve())
    stream = stub.exchange()
    await stream.write(StringValue(value="raise DRAINING"))
    with pytest.raises(ServiceError):
        await anext(stream)
    with pytest.raises(ServiceError):
        await stream.write(StringValue(value="echo hi"))
    await stream.done_writing()


async def test_a_request_of_the_wrong_type_fails_here_and_leaves_its_span(loopback, spans) -> None:
    stub = loopback.connect(await loopback.serve())
    with pytest.raises(TypeError):
        await stub.unary("not a message")
    assert spans.client.attributes["error.type"] == "TypeError"
    assert spans.client.attributes["rpc.response.status_code"] == "INTERNAL"


@pytest.mark.parametrize("shape", ["unary", "fan_out"])
async def test_an_answer_that_is_no_message_is_the_peers_defect(
    shape: str, loopback, spans
) -> None:
    channel = loopback.channel(await loopback.serve())
    make = channel.unary_unary if shape == "unary" else channel.unary_stream
    method = make(f"/test.Shapes/{SHAPES[shape]}", StringValue.SerializeToString, Struct.FromString)
    # Where a Struct has a message, the answer has a byte that begins none.
    result = method(StringValue(value="echo \x07"))
    with pytest.raises(ServiceError) as caught:
        await (result if shape == "unary" else anext(result))
    assert caught.value.reason is Reason.INTERNAL
    assert caught.value.metadata["service"] == "shapes"
    assert spans.client.attributes["error.type"] == "INTERNAL"


async def test_active_calls_return_to_zero(loopback) -> None:
    replica = await loopback.serve()
    stub = loopback.connect(replica)
    task = asyncio.create_task(call(stub, "unary", "sleep 60"))
    await replica.shapes.began.wait()
    labels = {"method": "test.Shapes/Unary"}
    name = "meshserve_rpc_server_active_calls"
    assert replica.metrics.registry.get_sample_value(name, labels) == 1
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
    await until(lambda: replica.metrics.registry.get_sample_value(name, labels) == 0)


async def test_an_unknown_method_makes_no_series(loopback) -> None:
    replica = await loopback.serve()
    unknown = loopback.channel(replica).unary_unary("/test.Shapes/Nothing")
    with pytest.raises(ServiceError) as caught:
        await unknown(b"")
    assert caught.value.metadata["code"] == "UNIMPLEMENTED"
    exposed = generate_latest(replica.metrics.registry).decode()
    assert "Nothing" not in exposed
