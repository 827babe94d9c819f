"""The deadline of the call being answered, so that each hop gets what remains of it."""

from __future__ import annotations

import time
from contextvars import ContextVar

from services.runtime.errors import Reason, ServiceError

_deadline: ContextVar[float | None] = ContextVar("meshserve_deadline", default=None)


def set_remaining(remaining_s: float | None) -> None:
    """Sets the deadline of the current task to `remaining_s` seconds from now; None has none."""
    _deadline.set(None if remaining_s is None else time.monotonic() + remaining_s)


def remaining_s() -> float | None:
    """Seconds until the deadline of the current task, never negative; None without one."""
    deadline = _deadline.get()
    return None if deadline is None else max(0.0, deadline - time.monotonic())


def bounded(timeout_s: float | None) -> float | None:
    """The shorter of a timeout and what remains until the deadline; None without either.

    Raises ServiceError DEADLINE_EXCEEDED when nothing remains: gRPC takes a timeout of 0 for none.
    """
    limits = [limit for limit in (timeout_s, remaining_s()) if limit is not None]
    if limits and min(limits) <= 0:
        raise ServiceError(Reason.DEADLINE_EXCEEDED, "the deadline passed")
    return min(limits, default=None)
