"""When streams are told of what has accrued for them."""

from __future__ import annotations

import asyncio

import pytest

from services.engine.core.messages import Delta, Finish, FinishReason, Timing
from services.engine.pacing import BASE_INTERVAL_S, INTERVAL_PER_SEQUENCE_S, Pacer
from services.engine.request_stream import CoreLostError, RequestStream
from tests.support.virtual_time import in_virtual_time

TIMING = Timing(received_ns=0, queued_ns=0)
HOUR_S = 3600.0


def make_stream(pacer: Pacer, *sequence_ids: int) -> RequestStream:
    return RequestStream(list(sequence_ids), lambda ids, *, abort: None, pacer)


async def pacer_between_ticks() -> Pacer:
    """A pacer that has just told its streams, and will not again for an hour."""
    pacer = Pacer(HOUR_S)
    pacer.set_running(10**9)
    ticked = asyncio.Event()
    pacer.wait(ticked.set)
    await ticked.wait()
    return pacer


def test_the_interval_grows_with_the_sequences_up_to_its_bound() -> None:
    pacer = Pacer(0.05)
    intervals = []
    for sequences in (1, 8, 32, 1000):
        pacer.set_running(sequences)
        intervals.append(pacer.interval_s)
    assert intervals == [
        pytest.approx(BASE_INTERVAL_S + INTERVAL_PER_SEQUENCE_S),
        pytest.approx(BASE_INTERVAL_S + 8 * INTERVAL_PER_SEQUENCE_S),
        0.05,
        0.05,
    ]


@in_virtual_time
async def test_all_who_wait_are_told_at_one_moment_and_no_more_than_once_an_interval() -> None:
    pacer = Pacer(0.05)
    pacer.set_running(1000)
    loop = asyncio.get_running_loop()
    told: list[tuple[int, float]] = []

    def tell(number: int) -> None:
        told.append((number, loop.time()))
        if number < 4:
            pacer.wait(lambda: tell(number + 2))

    for number in (0, 1):
        pacer.wait(lambda number=number: tell(number))
    assert not told, "never from within the call"
    await asyncio.sleep(0.3)
    assert [number for number, _ in told] == [0, 1, 2, 3, 4, 5]
    times = [time for _, time in told]
    for first, second in ((0, 1), (2, 3), (4, 5)):
        assert times[second] == times[first]
    assert times[2] - times[0] == pytest.approx(0.05)
    assert times[4] - times[2] == pytest.approx(0.05)


async def test_first_tokens_and_ends_are_told_at_once_and_what_lies_between_waits() -> None:
    pacer = await pacer_between_ticks()
    stream = make_stream(pacer, 7)
    stream.accrue(Delta(7, [1], timing=TIMING))
    assert [delta.token_ids for delta in await stream.read()] == [[1]]
    reading = asyncio.create_task(stream.read())
    stream.accrue(Delta(7, [2]))
    stream.accrue(Delta(7, [3]))
    await asyncio.sleep(0.05)
    assert not reading.done()
    stream.accrue(Delta(7, [4], timing=TIMING, finish=Finish(FinishReason.LENGTH)))
    assert [delta.token_ids for delta in await reading] == [[2], [3], [4]]
    assert await stream.read() == []


async def test_a_failure_is_told_at_once_after_what_came_before_it() -> None:
    stream = make_stream(await pacer_between_ticks(), 7)
    stream.accrue(Delta(7, [2]))
    stream.fail(CoreLostError("gone"))
    assert [delta.token_ids for delta in await stream.read()] == [[2]]
    for _ in range(2):
        with pytest.raises(CoreLostError):
            await stream.read()


async def test_without_an_interval_every_step_is_told_of() -> None:
    pacer = Pacer(0.0)
    pacer.set_running(1000)
    stream = make_stream(pacer, 7)
    for token_id in (1, 2, 3):
        stream.accrue(Delta(7, [token_id]))
        async with asyncio.timeout(1):
            assert [delta.token_ids for delta in await stream.read()] == [[token_id]]
