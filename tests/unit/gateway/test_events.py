"""Events are kept and replayed as they were, and joined without losing any of them."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator

import pytest
from hypothesis import given
from hypothesis import strategies as st

from meshserve.v1 import types_pb2
from services.gateway.coalesce import at_intervals
from services.gateway.events import ChoiceEnd, Event, TextDelta
from services.gateway.replay import replay, to_keep
from services.gateway.usage import summed
from services.runtime.errors import Reason, ServiceError

CHOICES = 3


def logprobs(token_ids: list[int]) -> types_pb2.Logprobs:
    return types_pb2.Logprobs(
        positions=[
            types_pb2.PositionLogprobs(chosen=types_pb2.TokenLogprob(token_id=each, logprob=-1.5))
            for each in token_ids
        ]
    )


@st.composite
def answers(draw: st.DrawFn) -> list[Event]:
    """The events of up to three choices, mixed, each choice ended by its own end."""
    events: list[Event] = []
    living = list(range(draw(st.integers(1, CHOICES))))
    while living:
        index = draw(st.sampled_from(living))
        if draw(st.integers(0, 3)):
            ids = draw(st.lists(st.integers(0, 9), max_size=3))
            detail = logprobs(ids) if draw(st.booleans()) else None
            events.append(TextDelta(index, draw(st.text(max_size=4)), ids, detail))
            continue
        living.remove(index)
        matched = draw(
            st.sampled_from([None, types_pb2.MatchedStop(), types_pb2.MatchedStop(text="END")])
        )
        events.append(
            ChoiceEnd(
                index,
                types_pb2.FINISH_REASON_STOP,
                matched,
                types_pb2.Usage(prompt_tokens=5, completion_tokens=draw(st.integers(0, 9))),
                draw(st.sampled_from([None, types_pb2.SafetyVerdict(policy_revision="r")])),
            )
        )
    return events


def of_choice(events: list[Event], index: int) -> list[Event]:
    return [event for event in events if event.index == index]


async def collected(events: AsyncGenerator[Event]) -> list[Event]:
    return [event async for event in events]


@given(events=answers())
def test_a_kept_answer_is_replayed_as_it_was_sent(events: list[Event]) -> None:
    replayed = asyncio.run(collected(replay(to_keep(events, 1))))
    for index in range(CHOICES):
        assert of_choice(replayed, index) == of_choice(events, index)
    deltas = [event for event in events if isinstance(event, TextDelta)]
    assert replayed[: len(deltas)] == deltas, "the choices stay mixed as they were"


async def play(events: list[Event], pause_s: float = 0.0) -> AsyncGenerator[Event]:
    for event in events:
        await asyncio.sleep(pause_s)
        yield event


def joined(events: list[Event], index: int) -> tuple[str, list[int], list[object], list[Event]]:
    deltas = [event for event in of_choice(events, index) if isinstance(event, TextDelta)]
    positions = [
        position for delta in deltas if delta.logprobs for position in delta.logprobs.positions
    ]
    ends = [event for event in of_choice(events, index) if isinstance(event, ChoiceEnd)]
    return (
        "".join(delta.text for delta in deltas),
        [token_id for delta in deltas for token_id in delta.token_ids],
        positions,
        ends,
    )


@given(events=answers(), interval_s=st.sampled_from([0.0005, 10.0]))
def test_joining_loses_nothing_and_ends_come_last(events: list[Event], interval_s: float) -> None:
    sent = asyncio.run(collected(at_intervals(play(events), interval_s)))
    for index in range(CHOICES):
        assert joined(sent, index) == joined(events, index)
        if of_choice(sent, index):
            assert isinstance(of_choice(sent, index)[-1], ChoiceEnd)
    if interval_s == 10.0:
        assert all(len(of_choice(sent, index)) <= 3 for index in range(CHOICES))


async def test_the_first_text_never_waits() -> None:
    stream = at_intervals(play([TextDelta(0, "a"), TextDelta(0, "b")], 0.05), 60.0)
    async with asyncio.timeout(1):
        assert await anext(stream) == TextDelta(0, "a")
        assert await anext(stream) == TextDelta(0, "b"), "nothing follows, so nothing is waited for"
    await stream.aclose()


async def test_what_came_before_an_error_is_sent_before_it() -> None:
    async def failing() -> AsyncGenerator[Event]:
        yield TextDelta(0, "a")
        yield TextDelta(0, "b")
        raise ServiceError(Reason.ENGINE_RESTARTED, "gone")

    sent: list[Event] = []

    async def read() -> None:
        async for event in at_intervals(failing(), 60.0):
            sent.append(event)  # noqa: PERF401 - what came before the error counts

    with pytest.raises(ServiceError) as caught:
        await read()
    assert caught.value.reason is Reason.ENGINE_RESTARTED
    assert sent == [TextDelta(0, "a"), TextDelta(0, "b")]


async def test_leaving_a_joined_stream_closes_what_it_reads() -> None:
    closed = asyncio.Event()

    async def endless() -> AsyncGenerator[Event]:
        try:
            while True:
                yield TextDelta(0, "a")
                await asyncio.sleep(0.001)
        finally:
            await asyncio.sleep(0.01)
            closed.set()

    stream = at_intervals(endless(), 0.002)
    await anext(stream)
    await anext(stream)
    await stream.aclose()
    assert closed.is_set()

    async def read() -> None:
        async for _ in at_intervals(endless(), 60.0):
            pass

    closed.clear()
    task = asyncio.create_task(read())
    await asyncio.sleep(0.02)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert closed.is_set()


def test_choices_share_one_prompt() -> None:
    total = summed(
        types_pb2.Usage(prompt_tokens=7, completion_tokens=n, cached_prompt_tokens=n)
        for n in (1, 2)
    )
    assert total == types_pb2.Usage(prompt_tokens=7, completion_tokens=3, cached_prompt_tokens=2)
