"""Waits for what other tasks and processes do. A limit says when to give up, not how quick it must
be: a busy machine is no failure."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable


async def until(condition: Callable[[], object], within_s: float = 30.0) -> None:
    """Returns once a condition holds. Raises TimeoutError after a time."""
    async with asyncio.timeout(within_s):
        while not condition():
            await asyncio.sleep(0.005)


def wait_until(condition: Callable[[], object], what: str, timeout_s: float = 30.0) -> None:
    """Returns once a condition holds. Fails after a time, and says what was waited for."""
    give_up_at = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < give_up_at, f"not within {timeout_s:g} s: {what}"
        time.sleep(0.02)
