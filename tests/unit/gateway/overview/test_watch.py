"""Watching: one poll for everybody who watches, and none for nobody."""

from __future__ import annotations

import asyncio
import contextvars
from contextlib import aclosing
from dataclasses import dataclass, field

import pytest

from meshserve.v1 import mesh_pb2
from services.gateway.overview.watch import MeshWatch
from services.runtime.errors import Reason, ServiceError
from tests.support.virtual_time import in_virtual_time


@dataclass
class Polls:
    """A mesh that counts how often it is looked at."""

    begun: int = 0
    forgotten: int = 0
    headers: list[str | None] = field(default_factory=list)
    takes_s: float = 0.0
    fails: bool = False

    async def poll(self, authorization: str | None) -> mesh_pb2.MeshSnapshot:
        self.begun += 1
        self.headers.append(authorization)
        await asyncio.sleep(self.takes_s)
        if self.fails:
            raise RuntimeError("a defect")
        return mesh_pb2.MeshSnapshot(window_ms=self.begun)

    async def forget(self) -> None:
        self.forgotten += 1


async def seen(watch: MeshWatch, interval_s: float, count: int) -> list[int]:
    """Which polls a watcher is shown."""
    numbers: list[int] = []
    async with aclosing(watch.snapshots(interval_s, None)) as snapshots:
        async for snapshot in snapshots:
            numbers.append(snapshot.window_ms)
            if len(numbers) == count:
                break
    return numbers


@in_virtual_time
async def test_two_watchers_cost_one_poll() -> None:
    polls = Polls()
    watch = MeshWatch(polls.poll, polls.forget, asyncio.Event())
    shown = await asyncio.gather(*(seen(watch, 0.1, 5) for _ in range(2)))
    assert shown == [[1, 2, 3, 4, 5]] * 2
    assert polls.begun == 5


@in_virtual_time
async def test_who_comes_later_sees_what_is_there_and_costs_nothing() -> None:
    polls = Polls()
    watch = MeshWatch(polls.poll, polls.forget, asyncio.Event())
    first = asyncio.create_task(seen(watch, 0.2, 5))
    await asyncio.sleep(0.3)
    began = asyncio.get_running_loop().time()
    assert await seen(watch, 0.2, 1) == [2]
    assert asyncio.get_running_loop().time() == began
    assert await first == [1, 2, 3, 4, 5]


@in_virtual_time
async def test_nobody_is_asked_while_nobody_watches() -> None:
    polls = Polls()
    watch = MeshWatch(polls.poll, polls.forget, asyncio.Event())
    assert await seen(watch, 0.05, 2) == [1, 2]
    begun = polls.begun
    await asyncio.sleep(0.3)
    assert polls.begun == begun
    assert polls.forgotten == 1
    assert await seen(watch, 30, 1) == [begun + 1], "and whoever comes next sees the mesh as it is"


@in_virtual_time
async def test_when_the_last_leaves_the_mesh_is_forgotten_at_once() -> None:
    polls = Polls()
    watch = MeshWatch(polls.poll, polls.forget, asyncio.Event())
    assert await seen(watch, 3600, 1) == [1]
    await asyncio.sleep(1)
    assert polls.forgotten == 1


@in_virtual_time
async def test_the_mesh_is_looked_at_in_nobodys_trace_or_time() -> None:
    request: contextvars.ContextVar[str] = contextvars.ContextVar("request", default="none")

    class Curious(Polls):
        async def poll(self, authorization: str | None) -> mesh_pb2.MeshSnapshot:
            assert request.get() == "none"
            return await super().poll(authorization)

    polls = Curious()
    request.set("of the first who watches")
    assert await seen(MeshWatch(polls.poll, polls.forget, asyncio.Event()), 1, 2) == [1, 2]


@in_virtual_time
async def test_each_watcher_has_an_interval_of_its_own() -> None:
    polls = Polls()
    watch = MeshWatch(polls.poll, polls.forget, asyncio.Event())
    slow, fast = await asyncio.gather(seen(watch, 0.4, 3), seen(watch, 0.1, 9))
    assert fast == list(range(1, 10))
    assert slow == [1, 5, 9]


@in_virtual_time
async def test_a_quick_watcher_need_not_wait_for_a_slow_one() -> None:
    polls = Polls()
    watch = MeshWatch(polls.poll, polls.forget, asyncio.Event())
    slow = asyncio.create_task(seen(watch, 30, 2))
    await asyncio.sleep(0.2)
    async with asyncio.timeout(5):
        assert await seen(watch, 0.1, 3) == [2, 3, 4]
    slow.cancel()


@in_virtual_time
async def test_a_poll_that_fails_is_made_again() -> None:
    polls = Polls(fails=True)
    watch = MeshWatch(polls.poll, polls.forget, asyncio.Event())
    watching = asyncio.create_task(seen(watch, 0.05, 1))
    await asyncio.sleep(0.2)
    polls.fails = False
    async with asyncio.timeout(5):
        assert (await watching)[0] > 2


@in_virtual_time
async def test_watchers_are_sent_away_at_the_end() -> None:
    draining = asyncio.Event()
    polls = Polls()
    watch = MeshWatch(polls.poll, polls.forget, draining)
    watching = asyncio.create_task(seen(watch, 30, 2))
    await asyncio.sleep(0.1)
    draining.set()
    with pytest.raises(ServiceError) as caught:
        async with asyncio.timeout(1):
            await watching
    assert caught.value.reason is Reason.DRAINING


@in_virtual_time
async def test_others_are_asked_in_the_name_of_who_watches() -> None:
    polls = Polls()
    watch = MeshWatch(polls.poll, polls.forget, asyncio.Event())
    async with aclosing(watch.snapshots(1, "Bearer x")) as snapshots:
        await anext(snapshots)
    assert polls.headers == ["Bearer x"]
