"""Does something on a thread beside native code that holds no interpreter lock."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TypeAlias

Work: TypeAlias = Callable[[], None]


class Helper:
    """A thread that waits for work; it ends with its helper."""

    def __init__(self) -> None:
        self._work: queue.SimpleQueue[Work | None] = queue.SimpleQueue()
        self._done: queue.SimpleQueue[Exception | None] = queue.SimpleQueue()
        threading.Thread(
            target=_work_off, args=(self._work, self._done), name="beside", daemon=True
        ).start()

    @contextmanager
    def doing(self, work: Work) -> Iterator[None]:
        """Does `work` beside the body and waits for it at its end. Raises what `work` raises."""
        self._work.put(work)
        try:
            yield
        finally:
            if (error := self._done.get()) is not None:
                raise error

    def __del__(self) -> None:
        self._work.put(None)


def _work_off(
    todo: queue.SimpleQueue[Work | None], done: queue.SimpleQueue[Exception | None]
) -> None:
    while (work := todo.get()) is not None:
        try:
            work()
        except Exception as error:
            done.put(error)
        else:
            done.put(None)
        del work  # it may hold the last reference to its helper
