"""The deadline of the call being answered, so that each hop gets what remains of it."""

from __future__ import annotations

import time
from contextvars import ContextVar

_deadline: ContextVar[float | None] = ContextVar("meshserve_deadline", default=None)


def set_remaining(remaining_s: float | None) -> None:
    """Sets the deadline of the current task to `remaining_s` seconds from now; None has none."""
    _deadline.set(None if remaining_s is None else time.monotonic() + remaining_s)


def remaining_s() -> float | None:
    """Seconds until the deadline of the current task, never negative; None without one."""
    deadline = _deadline.get()
    return None if deadline is None else max(0.0, deadline - time.monotonic())


def bounded(timeout_s: float | None) -> float | None:
    """The shorter of a timeout and what remains until the deadline."""
    remaining = remaining_s()
    if timeout_s is None:
        return remaining
    return timeout_s if remaining is None else min(timeout_s, remaining)
