"""Callers that wait for the same entry share one watch, and all of them hear of its end."""

from __future__ import annotations

import asyncio

import pytest

from meshserve.v1 import cache_pb2
from services.cache.backend import Reading
from services.cache.keys import EntryKey
from services.cache.waiting import AnswerWatches

KEY = EntryKey.of(cache_pb2.CacheKey(model="m", request=b"r"))
COMPUTING = Reading(b"", None, leased=True)
ANSWERED = Reading(b"", b"answer", leased=False)


class Entry:
    """Stands for the server: says what it is told to, and counts how often it was asked."""

    def __init__(self) -> None:
        self.reading: Reading | Exception = COMPUTING
        self.reads = 0

    async def read(self, key: EntryKey) -> Reading:
        assert key == KEY
        self.reads += 1
        if isinstance(self.reading, Exception):
            raise self.reading
        return self.reading


async def test_all_waiters_get_the_answer_from_one_watch():
    entry = Entry()
    watches = AnswerWatches(entry.read)
    waiters = [asyncio.create_task(watches.until_settled(KEY, 5)) for _ in range(100)]
    await asyncio.sleep(0.05)
    alone = entry.reads
    assert alone <= 12, "however many wait"
    entry.reading = ANSWERED
    watches.nudge(KEY)
    assert await asyncio.gather(*waiters) == [ANSWERED] * 100
    assert entry.reads <= alone + 2


async def test_an_answer_is_found_without_a_nudge():
    entry = Entry()
    watches = AnswerWatches(entry.read)
    waiter = asyncio.create_task(watches.until_settled(KEY, 5))
    await asyncio.sleep(0.2)
    entry.reading = ANSWERED
    reads = entry.reads
    assert await waiter == ANSWERED
    assert entry.reads == reads + 1


async def test_a_waiter_that_gives_up_leaves_the_others_waiting():
    entry = Entry()
    watches = AnswerWatches(entry.read)
    patient = asyncio.create_task(watches.until_settled(KEY, 5))
    assert await watches.until_settled(KEY, 0.03) is None
    gone = asyncio.create_task(watches.until_settled(KEY, 5))
    await asyncio.sleep(0.01)
    gone.cancel()
    entry.reading = ANSWERED
    assert await patient == ANSWERED


async def test_nothing_is_read_once_nobody_waits():
    entry = Entry()
    watches = AnswerWatches(entry.read)
    assert await watches.until_settled(KEY, 0.03) is None
    reads = entry.reads
    await asyncio.sleep(0.05)
    assert entry.reads == reads


async def test_a_failure_reaches_every_waiter_and_the_next_looks_anew():
    entry = Entry()
    watches = AnswerWatches(entry.read)
    waiters = [asyncio.create_task(watches.until_settled(KEY, 5)) for _ in range(5)]
    await asyncio.sleep(0.01)
    entry.reading = ConnectionError("gone")
    results = await asyncio.gather(*waiters, return_exceptions=True)
    assert all(isinstance(result, ConnectionError) for result in results)
    entry.reading = ANSWERED
    assert await watches.until_settled(KEY, 1) == ANSWERED


@pytest.mark.parametrize("when", ["before", "after"])
async def test_closing_sends_waiters_off(when):
    watches = AnswerWatches(Entry().read)
    if when == "before":
        watches.close()
    waiter = asyncio.create_task(watches.until_settled(KEY, 5))
    await asyncio.sleep(0.01)
    watches.close()
    assert await asyncio.wait_for(waiter, 0.5) is None
