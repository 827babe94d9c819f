"""The adapters of one model: what its core has loaded, and the next core is to load as well."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Awaitable, Callable, Mapping

from msgspec.structs import replace

from services.engine.core.messages import (
    AdapterChanged,
    Command,
    LoadAdapter,
    ModelFacts,
    UnloadAdapter,
)
from services.engine.core.settings import CoreSettings
from services.engine.request_stream import CoreLostError


class AdapterError(Exception):
    """The core did not load or unload an adapter; `kind` is the name of its error.

    `setting` is the limit that was reached, by CoreSettings, if it is one of these.
    """

    def __init__(self, kind: str, message: str, setting: str = "") -> None:
        super().__init__(message)
        self.kind = kind
        self.setting = setting


class CoreAdapters:
    """What a core client knows of its core's adapters. It outlives the core: the next one is told
    to load what this one had, before it takes requests."""

    def __init__(self, send: Callable[[Command], None]) -> None:
        """`send` gives the core a command, or raises CoreUnavailableError."""
        self._send = send
        self._paths: dict[str, str] | None = None  # of what the core has; None: there was none yet
        self._numbers = itertools.count()
        self._waiting: dict[
            int, tuple[LoadAdapter | UnloadAdapter, asyncio.Future[AdapterChanged]]
        ] = {}

    @property
    def names(self) -> Mapping[str, str]:
        """The adapters that requests may use."""
        return self._paths or {}

    def for_next_core(self, settings: CoreSettings) -> CoreSettings:
        """The settings of the next core: with the adapters that the one before it had, of which
        those are left out that are not to be had any more."""
        if self._paths is None:
            return settings
        return replace(settings, adapters=dict(self._paths), adapters_may_fail=True)

    def take_ready(self, settings: CoreSettings, facts: ModelFacts) -> None:
        """Take in what a new core has loaded, of what it was told."""
        told = self.for_next_core(settings).adapters
        self._paths = {name: told[name] for name in facts.adapters}

    def take(self, change: AdapterChanged) -> None:
        """Take in what the core says of an adapter."""
        command, answer = self._waiting.pop(change.number)
        # Also for a caller that is gone.
        if isinstance(command, LoadAdapter) and not change.error_kind and self._paths is not None:
            self._paths[command.name] = command.path
        if not answer.done():
            answer.set_result(change)

    def fail_all(self, error: CoreLostError) -> None:
        """The core has ended."""
        for _, answer in self._waiting.values():
            if not answer.done():
                answer.set_exception(error)
        self._waiting.clear()

    async def load(self, name: str, path: str) -> int:
        """Have the core load an adapter, while it goes on with its requests; returns its bytes.

        Raises:
            AdapterError: it did not.
            CoreLostError: the core ended meanwhile.
            CoreUnavailableError: there is no core that could.
        """
        change = await self._ask(LoadAdapter(next(self._numbers), name, path))
        return change.size_bytes

    async def unload(self, name: str) -> None:
        """Let no more requests use an adapter, and have the core unload it once none does.

        Raises what `load` raises, but for CoreLostError: what the core had is gone with it.
        """
        answer = self._ask(UnloadAdapter(next(self._numbers), name))
        if self._paths is not None:
            self._paths.pop(name, None)
        try:
            await answer
        except CoreLostError:
            return

    async def _await(self, number: int) -> AdapterChanged:
        change = await self._waiting[number][1]
        if change.error_kind:
            raise AdapterError(change.error_kind, change.error, change.setting)
        return change

    def _ask(self, command: LoadAdapter | UnloadAdapter) -> Awaitable[AdapterChanged]:
        self._send(command)
        answer = asyncio.get_running_loop().create_future()
        self._waiting[command.number] = (command, answer)
        return self._await(command.number)
