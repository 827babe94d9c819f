"""Has engines load what is desired: those that start later, that have started anew, or that failed.

All gateways look, and the one that gets the lease of a model acts. Nothing is done where an engine
has what it should; what failed is tried again ever later, and what nobody wants is taken away only
once it has been there for a while, for another gateway may be about to want it.
"""

from __future__ import annotations

import asyncio
import contextvars
import logging
import time
from collections.abc import Callable, Iterable

from services.gateway.hosting.calls import HostingCalls
from services.gateway.hosting.hosting import Hosting
from services.gateway.hosting.plan import Action, actions
from services.runtime.errors import ServiceError
from services.runtime.replicas import Replica

log = logging.getLogger(__name__)

INTERVAL_S = 1.0
# Longer than it takes all gateways to learn of a change.
STRAY_GRACE_S = 10.0
FIRST_RETRY_S = 2.0
LONGEST_RETRY_S = 300.0

# What is to be done, at which process.
Task = tuple[str, Action]


class Reconciler:
    """Looks at an interval.

    Args:
        hosting: what is desired, and what is there.
        calls: to engines.
        models: those of the settings.
        now: the time in seconds, for tests.
    """

    def __init__(
        self,
        hosting: Hosting,
        calls: HostingCalls,
        models: Iterable[str],
        now: Callable[[], float] = time.monotonic,
    ) -> None:
        self._hosting = hosting
        self._calls = calls
        self._models = tuple(models)
        self._now = now
        self._failures: dict[Task, tuple[int, float]] = {}
        self._strays: dict[Task, float] = {}
        self._working: dict[str, asyncio.Task[None]] = {}
        self._task: asyncio.Task[None] | None = None

    def start(self) -> None:
        """Begins to look."""
        self._task = asyncio.create_task(self._run(), context=contextvars.Context())

    async def stop(self) -> None:
        """Looks no more; what engines were asked for may be under way there."""
        tasks = [*self._working.values(), *([self._task] if self._task else [])]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def look(self) -> None:
        """Looks once, and begins what is to be done."""
        await self._hosting.refresh()
        self._note()
        self._working = {name: task for name, task in self._working.items() if not task.done()}
        for model in self._models:
            if model not in self._working and self._due(model):
                # What an engine is asked for has a deadline of its own.
                self._working[model] = asyncio.create_task(
                    self._work(model), context=contextvars.Context()
                )

    async def settle(self) -> None:
        """Returns once nothing is under way."""
        await asyncio.gather(*self._working.values())

    async def _run(self) -> None:
        while True:
            try:
                await self.look()
            except Exception:
                log.exception("what is loaded cannot be compared with what should be")
            await asyncio.sleep(INTERVAL_S)

    def _wanted(self, model: str) -> list[tuple[Replica, Action]]:
        desired = self._hosting.store.current
        return [
            (replica, action)
            for replica, hosted in self._hosting.watch(model).on_replicas(model)
            for action in actions(desired, hosted)
        ]

    def _note(self) -> None:
        """Remembers since when strays have been there, and forgets what is over."""
        now = self._now()
        tasks = {
            _task(replica, action)
            for model in self._models
            for replica, action in self._wanted(model)
        }
        self._strays = {
            task: self._strays.get(task, now) for task in tasks if task[1].kind == "unload_adapter"
        }
        self._failures = {task: kept for task, kept in self._failures.items() if task in tasks}

    def _due(self, model: str) -> dict[Replica, list[Action]]:
        now = self._now()
        due: dict[Replica, list[Action]] = {}
        for replica, action in self._wanted(model):
            task = _task(replica, action)
            is_stray = action.kind == "unload_adapter"
            if is_stray and now - self._strays.get(task, now) < STRAY_GRACE_S:
                continue
            if task in self._failures and now < self._failures[task][1]:
                continue
            due.setdefault(replica, []).append(action)
        return due

    async def _work(self, model: str) -> None:
        try:
            async with self._hosting.store.lease(model, wait=False) as is_ours:
                if not is_ours:
                    return
                # Whoever had the lease before may have changed everything.
                await self._hosting.store.refresh()
                await self._hosting.look(model)
                due = self._due(model)
                await asyncio.gather(*(self._mend(model, *each) for each in due.items()))
                await self._hosting.look(model)
        except ServiceError as error:
            log.info("nothing is done about %s: %s", model, error.message)
        except Exception:
            log.exception("the engines of %s cannot be given what they should have", model)

    async def _mend(self, model: str, replica: Replica, wanted: list[Action]) -> None:
        """Does at one engine what there is to do, one after another."""
        channel = self._hosting.watch(model).channel
        for action in wanted:
            task = _task(replica, action)
            try:
                await self._calls.perform(channel, replica, action)
            except ServiceError as error:
                count = self._failures.get(task, (0, 0.0))[0]
                delay_s = min(LONGEST_RETRY_S, FIRST_RETRY_S * 2**count)
                self._failures[task] = count + 1, self._now() + delay_s
                log.warning(
                    "%s of %s failed at %s, and is tried again in %g s: %s",
                    action.kind,
                    action.adapter or model,
                    replica.address,
                    delay_s,
                    error.message,
                )
            else:
                self._failures.pop(task, None)
                log.info(
                    "%s of %s done at %s", action.kind, action.adapter or model, replica.address
                )


def _task(replica: Replica, action: Action) -> Task:
    return replica.instance_id or replica.address, action
