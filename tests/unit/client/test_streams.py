"""Streams give what has been generated so far, and stop the server when they are closed."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import grpc
import pytest
from hypothesis import given
from hypothesis import strategies as st

from meshserve import (
    AsyncClient,
    Client,
    FinishReason,
    IncompleteStreamError,
    RequestCancelledError,
    Usage,
)
from meshserve.accumulators import CompletionAccumulator
from meshserve.v1 import gateway_pb2
from tests.fakes.scripted_gateway import ScriptedGateway, capital_of_france

Event = gateway_pb2.StreamGenerateResponse


def playing(messages: list[Any]) -> Callable[[Any, Any], Iterator[Any]]:
    return lambda request, context: iter(messages)


def endless(request: Any, context: grpc.ServicerContext) -> Iterator[Any]:
    while context.is_active():
        yield Event(chunk={"deltas": [{"text": "x"}]})
        time.sleep(0.005)


def test_a_stream_is_iterated_chunk_by_chunk(gateway: ScriptedGateway, client: Client) -> None:
    gateway.on("StreamGenerate", playing(capital_of_france()))

    stream = client.stream_generate("The capital of France is", min_interval_ms=20)
    texts = [chunk.text for chunk in stream]

    assert texts == ["Par", "is."]
    assert gateway.requests[0].stream_options.min_interval_ms == 20
    assert (stream.text, stream.request_id, stream.model) == ("Paris.", "r1", "smollm2-135m")
    assert stream.prompt_tokens == 7
    assert stream.usage == Usage(7, 3, 4, 0)


def test_a_stream_is_collected_into_what_the_unary_call_gives(
    gateway: ScriptedGateway, client: Client
) -> None:
    gateway.on("StreamGenerate", playing(capital_of_france()))

    with client.stream_generate("x") as stream:
        first = next(stream)
        completion = stream.collect()

    assert first.text == "Par"
    assert completion.text == "Paris."
    assert completion.choices[0].token_ids == (5, 9)
    assert completion.finish_reason is FinishReason.STOP
    assert completion.choices[0].matched_stop == "\n"
    assert completion.usage.completion_tokens == 3
    assert stream.collect() == completion


def test_text_alone_is_iterated_for_the_first_choice(
    gateway: ScriptedGateway, client: Client
) -> None:
    messages = [
        Event(chunk={"deltas": [{"index": 1, "text": "other"}, {"index": 0, "text": "a"}]}),
        Event(chunk={"deltas": [{"index": 0, "text": "b"}]}),
        Event(complete={"index": 0, "usage": {"prompt_tokens": 3, "completion_tokens": 2}}),
        Event(complete={"index": 1, "usage": {"prompt_tokens": 3, "completion_tokens": 1}}),
    ]
    gateway.on("StreamGenerate", playing(messages))

    stream = client.stream_generate("x", n=2)

    assert "".join(stream.iter_text()) == "ab"
    assert [choice.text for choice in stream.collect().choices] == ["ab", "other"]
    assert stream.usage == Usage(prompt_tokens=3, completion_tokens=3)


def test_a_chat_is_streamed_with_reasoning_and_tools(
    gateway: ScriptedGateway, client: Client
) -> None:
    response = gateway_pb2.StreamChatResponse
    messages = [
        response(started={"model": "m"}),
        response(chunk={"deltas": [{"reasoning_content": "Let me"}]}),
        response(chunk={"deltas": [{"reasoning_content": " see.", "content": "Hel"}]}),
        response(chunk={"deltas": [{"content": "lo"}]}),
        response(chunk={"deltas": [{"tool_calls": [{"id": "1", "name": "weather"}]}]}),
        response(complete={"finish_reason": "FINISH_REASON_TOOL_CALLS", "cached": True}),
    ]
    gateway.on("StreamChat", playing(messages))

    answer = client.stream_chat("Hi").collect()

    assert answer.message.role == "assistant"
    assert answer.text == "Hello"
    assert answer.message.reasoning_content == "Let me see."
    assert [call.name for call in answer.message.tool_calls] == ["weather"]
    assert answer.finish_reason is FinishReason.TOOL_CALLS
    assert answer.cached


def test_closing_a_stream_cancels_the_request(gateway: ScriptedGateway, client: Client) -> None:
    gateway.on("StreamGenerate", endless)
    with client.stream_generate("x") as stream:
        next(stream)
    assert gateway.cancelled.wait(5)
    with pytest.raises(RequestCancelledError, match="closed before its end"):
        next(stream)
    with pytest.raises(RequestCancelledError):
        stream.collect()
    stream.close()


def test_an_error_in_the_block_cancels_the_request(
    gateway: ScriptedGateway, client: Client
) -> None:
    gateway.on("StreamGenerate", endless)
    stream = client.stream_generate("x")
    next(stream)
    with pytest.raises(KeyError), stream:
        raise KeyError
    assert gateway.cancelled.wait(5)


def test_a_reader_in_another_thread_sees_the_close(
    gateway: ScriptedGateway, client: Client
) -> None:
    started = threading.Event()

    def silent(request: Any, context: grpc.ServicerContext) -> Iterator[Any]:
        started.set()
        while context.is_active():
            time.sleep(0.01)
        yield from ()

    gateway.on("StreamGenerate", silent)
    stream = client.stream_generate("x")
    timer = threading.Timer(0.1, stream.close)
    timer.start()
    with pytest.raises(RequestCancelledError):
        stream.collect()
    timer.join()


def test_closing_after_the_end_changes_nothing(gateway: ScriptedGateway, client: Client) -> None:
    gateway.on("StreamGenerate", playing(capital_of_france()))
    with client.stream_generate("x") as stream:
        completion = stream.collect()
    assert stream.collect() == completion


@pytest.mark.parametrize("kept", range(4))
def test_a_stream_that_stops_short_is_never_an_answer(
    gateway: ScriptedGateway, client: Client, kept: int
) -> None:
    gateway.on("StreamGenerate", playing(capital_of_france()[:kept]))
    stream = client.stream_generate("x")
    for _ in range(2):
        with pytest.raises(IncompleteStreamError):
            stream.collect()


def test_a_missing_choice_is_missed_even_if_it_never_spoke(
    gateway: ScriptedGateway, client: Client
) -> None:
    gateway.on("StreamGenerate", playing(capital_of_france()))
    with pytest.raises(IncompleteStreamError):
        client.stream_generate("x", n=2).collect()


def test_text_after_the_end_of_its_choice_breaks_the_stream(
    gateway: ScriptedGateway, client: Client
) -> None:
    gateway.on("StreamGenerate", playing([*capital_of_france(), capital_of_france()[1]]))
    with pytest.raises(IncompleteStreamError, match="went on after its end"):
        client.stream_generate("x").collect()


async def test_the_asyncio_stream_gives_the_same(gateway: ScriptedGateway, client: Client) -> None:
    gateway.on("StreamGenerate", playing(capital_of_france()))
    expected = client.stream_generate("x").collect()
    async with AsyncClient(gateway.target) as aclient:
        async with aclient.stream_generate("x") as stream:
            assert [chunk.text async for chunk in stream] == ["Par", "is."]
        assert await stream.collect() == expected
        texts = [text async for text in aclient.stream_generate("x").aiter_text()]
    assert texts == ["Par", "is."]


async def test_closing_an_asyncio_stream_cancels_the_request(gateway: ScriptedGateway) -> None:
    gateway.on("StreamGenerate", endless)
    async with AsyncClient(gateway.target) as client:
        async with client.stream_generate("x") as stream:
            await anext(stream)
        assert await asyncio.to_thread(gateway.cancelled.wait, 5)
        with pytest.raises(RequestCancelledError):
            await anext(stream)


async def test_cancelling_the_reading_task_cancels_the_request(gateway: ScriptedGateway) -> None:
    gateway.on("StreamGenerate", endless)
    async with AsyncClient(gateway.target) as client:
        stream = client.stream_generate("x")
        reading = asyncio.create_task(stream.collect())
        await asyncio.sleep(0.1)
        reading.cancel()
        with pytest.raises(asyncio.CancelledError):
            await reading
        assert await asyncio.to_thread(gateway.cancelled.wait, 5)


async def test_a_reader_in_another_task_sees_the_close(gateway: ScriptedGateway) -> None:
    def silent(request: Any, context: grpc.ServicerContext) -> Iterator[Any]:
        while context.is_active():
            time.sleep(0.01)
        yield from ()

    gateway.on("StreamGenerate", silent)
    async with AsyncClient(gateway.target) as client:
        stream = client.stream_generate("x")
        reading = asyncio.create_task(stream.collect())
        await asyncio.sleep(0.1)
        await stream.aclose()
        with pytest.raises(RequestCancelledError):
            await reading


@given(
    pieces=st.lists(st.tuples(st.integers(0, 2), st.text(max_size=4)), max_size=30),
)
def test_text_of_each_choice_is_its_pieces_in_order(pieces: list[tuple[int, str]]) -> None:
    accumulator = CompletionAccumulator(3, "")
    for index, text in pieces:
        accumulator.feed(Event(chunk={"deltas": [{"index": index, "text": text}]}))
    for index in range(3):
        accumulator.feed(Event(complete={"index": index}))
    completion = accumulator.result()
    for choice in completion.choices:
        assert choice.text == "".join(text for index, text in pieces if index == choice.index)
