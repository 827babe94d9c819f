"""One clock for all timing facts: monotonic, read as nanoseconds since the Unix epoch."""

from __future__ import annotations

import time

# Fixed once per process, so that differences are immune to wall-clock adjustments.
_EPOCH_OFFSET_NS = time.time_ns() - time.monotonic_ns()


def now_ns() -> int:
    """Nanoseconds since the Unix epoch, never going backwards within this process."""
    return time.monotonic_ns() + _EPOCH_OFFSET_NS
