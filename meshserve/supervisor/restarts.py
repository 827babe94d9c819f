"""When a process that died is started again, and when it is given up; no clock of its own."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class RestartLimits:
    """Back-off and patience. Each crash doubles the wait; a process that then runs well for
    `forgive_after_s` starts over."""

    first_delay_s: float = 0.5
    max_delay_s: float = 30.0
    max_crashes: int = 5
    window_s: float = 120.0
    forgive_after_s: float = 60.0


class RestartPolicy:
    """Decides for one process.

    Invariant: of any `max_crashes + 1` crashes within `window_s`, none of which followed a run of
    `forgive_after_s`, the last one is final.
    """

    def __init__(self, limits: RestartLimits) -> None:
        self._limits = limits
        self._crashes: deque[float] = deque()

    @property
    def crashes(self) -> int:
        """Crashes that count now."""
        return len(self._crashes)

    def record_crash(self, now_s: float, uptime_s: float) -> float | None:
        """Seconds to wait before the next start, or None to give the process up.

        `now_s` is monotonic; `uptime_s` is how long the process had been healthy.
        """
        limits = self._limits
        if uptime_s >= limits.forgive_after_s:
            self._crashes.clear()
        while self._crashes and now_s - self._crashes[0] > limits.window_s:
            self._crashes.popleft()
        self._crashes.append(now_s)
        if len(self._crashes) > limits.max_crashes:
            return None
        doublings = len(self._crashes) - 1
        return min(limits.first_delay_s * 2.0**doublings, limits.max_delay_s)
