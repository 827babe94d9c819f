"""Waiting for another's answer: callers of one replica that want the same share one watch of it.

The watch reads the entry again and again, at intervals that grow with the time waited. That costs
more commands than a subscription would, but cannot miss anything: not a lease that ran out by
itself, not what happened while a connection was being restored.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field

from services.cache.backend import Reading
from services.cache.keys import EntryKey

# A caller wakes late by at most this share of what it has waited, within these bounds.
_SHARE_OF_WAIT = 0.05
_MIN_INTERVAL_S = 0.005
_MAX_INTERVAL_S = 0.25


@dataclass
class _Watch:
    nudged: asyncio.Event = field(default_factory=asyncio.Event)
    waiters: int = 0
    task: asyncio.Task[Reading | None] | None = None


class AnswerWatches:
    """The entries that callers of this replica wait for."""

    def __init__(self, read: Callable[[EntryKey], Awaitable[Reading]]) -> None:
        self._read = read
        self._watches: dict[EntryKey, _Watch] = {}
        self._closed = False

    async def until_settled(self, key: EntryKey, timeout_s: float) -> Reading | None:
        """The entry once it has an answer or no lease; None if that takes longer or we shut down.

        Raises what reading the entry raises.
        """
        if self._closed:
            return None
        watch = self._watches.get(key)
        if watch is None:
            watch = self._watches[key] = _Watch()
            watch.task = asyncio.create_task(self._poll(key, watch))
            # If all waiters have left when reading fails, nobody is there to be told.
            watch.task.add_done_callback(lambda task: task.cancelled() or task.exception())
        assert watch.task is not None
        watch.waiters += 1
        try:
            done, _ = await asyncio.wait({watch.task}, timeout=timeout_s)
            return watch.task.result() if done else None
        finally:
            watch.waiters -= 1
            if watch.waiters == 0:
                watch.task.cancel()
                self._forget(key, watch)

    def nudge(self, key: EntryKey) -> None:
        """Says that an entry has changed, so that waiters here need not find out."""
        if (watch := self._watches.get(key)) is not None:
            watch.nudged.set()

    def close(self) -> None:
        """Sends all waiters off without an answer."""
        self._closed = True
        for watch in self._watches.values():
            watch.nudged.set()

    async def _poll(self, key: EntryKey, watch: _Watch) -> Reading | None:
        started = time.monotonic()
        try:
            while True:
                waited_s = time.monotonic() - started
                interval_s = min(max(_SHARE_OF_WAIT * waited_s, _MIN_INTERVAL_S), _MAX_INTERVAL_S)
                try:
                    async with asyncio.timeout(interval_s):
                        await watch.nudged.wait()
                except TimeoutError:
                    pass
                if self._closed:
                    return None
                watch.nudged.clear()
                reading = await self._read(key)
                if reading.value is not None or not reading.leased:
                    return reading
        finally:
            # Who comes from now on must look anew.
            self._forget(key, watch)

    def _forget(self, key: EntryKey, watch: _Watch) -> None:
        if self._watches.get(key) is watch:
            del self._watches[key]
