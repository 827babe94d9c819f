"""Watching the mesh: one poll of all replicas for everybody who watches, and none for nobody."""

from __future__ import annotations

import asyncio
import contextvars
import logging
from collections.abc import AsyncGenerator, Awaitable, Callable
from dataclasses import dataclass

from meshserve.v1 import mesh_pb2
from services.runtime.errors import Reason, ServiceError

log = logging.getLogger(__name__)

Poll = Callable[[str | None], Awaitable[mesh_pb2.MeshSnapshot]]
"""Asks all replicas, in the name of somebody with an `authorization` header or none."""


@dataclass(eq=False)
class _Watcher:
    interval_s: float
    authorization: str | None


class MeshWatch:
    """Gives snapshots to any number of watchers.

    Args:
        poll: takes a snapshot.
        forget: called when nobody watches any more.
        draining: once set, watchers are sent away.
    """

    def __init__(
        self, poll: Poll, forget: Callable[[], Awaitable[None]], draining: asyncio.Event
    ) -> None:
        self._poll = poll
        self._forget = forget
        self._draining = draining
        self._watchers: set[_Watcher] = set()
        self._latest: mesh_pb2.MeshSnapshot | None = None
        self._latest_at = float("-inf")
        self._published = asyncio.Event()
        self._changed = asyncio.Event()
        self._task: asyncio.Task[None] | None = None

    async def snapshots(
        self, interval_s: float, authorization: str | None
    ) -> AsyncGenerator[mesh_pb2.MeshSnapshot]:
        """The mesh at once and then at an interval; whoever asks must be an operator. Other
        gateways are asked with the same `authorization`.

        Raises ServiceError (DRAINING) when the gateway shuts down.
        """
        watcher = _Watcher(interval_s, authorization)
        self._watchers.add(watcher)
        self._changed.set()
        if self._task is None or self._task.done():
            # Not in the trace, nor under the deadline, of whoever happens to be the first.
            self._task = asyncio.create_task(self._run(), context=contextvars.Context())
        try:
            given_at = float("-inf")
            while not self._draining.is_set():
                published = self._published
                if self._latest is not None and self._is_due(given_at, interval_s):
                    given_at = self._latest_at
                    yield self._latest
                    continue
                await self._any_of(published, self._draining)
            raise ServiceError(Reason.DRAINING, "this gateway is shutting down", retry_after_s=1.0)
        finally:
            self._watchers.discard(watcher)
            self._changed.set()

    @property
    def _poll_interval_s(self) -> float:
        return min(watcher.interval_s for watcher in self._watchers)

    def _is_due(self, given_at: float, interval_s: float) -> bool:
        """Whether the latest snapshot is one to give, to who got one of `given_at` before: of all
        polls, the one nearest to the time at which the watcher wants the next."""
        age_s = asyncio.get_running_loop().time() - self._latest_at
        due_at = given_at + interval_s - self._poll_interval_s / 2
        return self._latest_at >= due_at and age_s <= interval_s

    async def _run(self) -> None:
        while self._watchers:
            while self._watchers:
                began = asyncio.get_running_loop().time()
                await self._publish()
                await self._pause(began)
            self._latest = None
            # Somebody may come while this is under way.
            await self._forget()

    async def _publish(self) -> None:
        authorization = next((watcher.authorization for watcher in self._watchers), None)
        try:
            self._latest = await self._poll(authorization)
        except Exception:
            log.exception("the mesh could not be looked at")
            return
        self._latest_at = asyncio.get_running_loop().time()
        # Those who wait do so for the event of the snapshot they have seen.
        self._published.set()
        self._published = asyncio.Event()

    async def _pause(self, began: float) -> None:
        """Returns when it is time for the next poll, or nobody watches."""
        loop = asyncio.get_running_loop()
        while self._watchers:
            due = began + self._poll_interval_s
            if loop.time() >= due:
                return
            self._changed.clear()
            try:
                async with asyncio.timeout_at(due):
                    await self._changed.wait()
            except TimeoutError:
                return

    @staticmethod
    async def _any_of(*events: asyncio.Event) -> None:
        waiting = [asyncio.create_task(event.wait()) for event in events]
        try:
            await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for task in waiting:
                task.cancel()
