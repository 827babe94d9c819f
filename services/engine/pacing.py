"""When the tokens that have accrued for the streams are sent: for all of them at one moment.

A message costs every service on its way about the same, whatever it carries, and with many streams
the messages of every step would take more processor time than the step. So the first token of a
stream and its end go at once, and what lies between goes at an interval that grows with the number
of sequences: the messages per second of all streams together stay bounded, and those of one moment
can travel together.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable

# With one sequence, and how much more with each further one.
BASE_INTERVAL_S = 0.010
INTERVAL_PER_SEQUENCE_S = 0.0015


class Pacer:
    """Calls back for all streams that wait, at most once in an interval.

    Args:
        longest_interval_s: bounds the interval, however many sequences run; 0 is no interval.
    """

    def __init__(self, longest_interval_s: float = 0.0) -> None:
        self._longest_interval_s = longest_interval_s
        self._interval_s = 0.0
        self._last_tick_s = float("-inf")
        self._waiting: list[Callable[[], None]] = []

    def set_running(self, sequences: int) -> None:
        """How many sequences the core computes now."""
        self._interval_s = min(
            self._longest_interval_s, BASE_INTERVAL_S + INTERVAL_PER_SEQUENCE_S * sequences
        )

    @property
    def interval_s(self) -> float:
        """The interval now."""
        return self._interval_s

    def wait(self, callback: Callable[[], None]) -> None:
        """Have `callback` called at the next moment: at once where the last is an interval ago."""
        self._waiting.append(callback)
        if len(self._waiting) > 1:
            return
        loop = asyncio.get_running_loop()
        # Never from within this call: what one step brought is taken in as a whole before.
        loop.call_at(max(loop.time(), self._last_tick_s + self._interval_s), self._tick)

    def _tick(self) -> None:
        self._last_tick_s = asyncio.get_running_loop().time()
        waiting, self._waiting = self._waiting, []
        for callback in waiting:
            callback()
