"""Memory that the C library keeps for later."""

from __future__ import annotations

import ctypes

# Where the C library has it (glibc).
_trim = getattr(ctypes.CDLL(None), "malloc_trim", None)


def trim_heap() -> None:
    """Return what the heap does not need to the system."""
    if _trim is not None:
        _trim(0)
