"""Files that may change while a service runs: keys, certificates, addresses.

They are compared by content, every second, so it makes no difference how they are replaced: written
in place, renamed over, or by the swap of a folder's link, as Kubernetes does with a Secret.
"""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
import logging
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path
from typing import TypeAlias

from services.runtime.telemetry import Metrics

log = logging.getLogger(__name__)

INTERVAL_S = 1.0

Contents: TypeAlias = tuple[bytes, ...]
"""What files hold, in the order of their paths."""


class FilesRefusedError(Exception):
    """What the files hold cannot be used. The text says where and why, and repeats no secret."""


def read_files(paths: Sequence[Path]) -> Contents:
    """What files hold. Raises FilesRefusedError."""
    try:
        return tuple(path.read_bytes() for path in paths)
    except OSError as error:
        raise FilesRefusedError(f"{error.filename}: cannot be read: {error.strerror}") from error


class FileWatch:
    """Offers what files hold to who uses it, whenever that has changed.

    A change counts once it has been read twice: a file that is half written, or a pair of which one
    is still the old one, is nothing that anybody meant. What is refused is offered again as long as
    it is there.

    Args:
        what: the files hold, as the label of metrics: `api_keys`.
        paths: of the files.
        take: uses what they hold, whole, or raises FilesRefusedError and has changed nothing.
        in_use: what the files held when they were read at the start.
    """

    def __init__(
        self,
        what: str,
        paths: Sequence[Path],
        take: Callable[[Contents], Awaitable[None]],
        metrics: Metrics,
        *,
        in_use: Contents,
    ) -> None:
        self._what = what
        self._paths = tuple(paths)
        self._take = take
        self._in_use = in_use
        # What was read last, or why nothing could be.
        self._last: Contents | str | None = None
        self._problem = ""
        self._one_at_a_time = asyncio.Lock()
        self._reloads = metrics.counter("meshserve_file_reloads")
        self._refused = metrics.gauge("meshserve_files_refused").labels(what)
        self._refused.set(0)
        self._task: asyncio.Task[None] | None = None

    def start(self) -> None:
        """Looks every second from now on."""
        self._task = asyncio.create_task(self._watch(), context=contextvars.Context())

    async def stop(self) -> None:
        """Looks no more."""
        if self._task is not None:
            self._task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._task

    async def look(self, *, twice: bool = True) -> None:
        """Reads the files and offers what has changed; without `twice` at the first sight."""
        async with self._one_at_a_time:
            found: Contents | str
            try:
                found = await asyncio.to_thread(read_files, self._paths)
            except FilesRefusedError as error:
                found = str(error)
            has_settled = found == self._last or not twice
            self._last = found
            if found == self._in_use:
                self._note("")
            elif has_settled and isinstance(found, str):
                self._note(found)
            elif has_settled and not isinstance(found, str):
                await self._offer(found)

    async def _watch(self) -> None:
        while True:
            await asyncio.sleep(INTERVAL_S)
            try:
                await self.look()
            except Exception as error:
                problem = f"unexpected {type(error).__name__}"
                if problem != self._problem:
                    log.exception("%s: a change of the files could not be taken", self._what)
                self._note(problem)

    async def _offer(self, contents: Contents) -> None:
        try:
            await self._take(contents)
        except FilesRefusedError as error:
            self._note(str(error))
            return
        self._in_use = contents
        self._note("")
        self._reloads.labels(self._what, "taken").inc()
        log.info("%s: what the files hold now is in use", self._what)

    def _note(self, problem: str) -> None:
        """Says once what is wrong."""
        if problem and problem != self._problem:
            self._reloads.labels(self._what, "refused").inc()
            log.warning("%s: what was in use before stays so: %s", self._what, problem)
        self._problem = problem
        self._refused.set(bool(problem))
