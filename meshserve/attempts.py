"""When a client asks again by itself: where nothing of an answer has come from a gateway that is
away or going away.

gRPC's own retries are not used: with them, calls whose connection breaks may wait on beyond their
deadline (grpcio 1.85.1).
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import grpc

# CANCELLED is how gRPC refuses what reaches a server that shuts down.
_NOT_HEARD_OF = (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.CANCELLED)
_PAUSES_S = (0.1, 0.3)


class Attempts:
    """The attempts of one request.

    Args:
        make_call: begins a call that may take so many seconds, None for no limit.
        timeout_s: for all attempts together.
    """

    def __init__(self, make_call: Callable[[float | None], Any], timeout_s: float | None) -> None:
        self._make_call = make_call
        self._ends_at = None if timeout_s is None else time.monotonic() + timeout_s
        self._pauses_s = list(_PAUSES_S)

    def begin(self) -> Any:
        """The next attempt: a call under way, or its answer, as `make_call` has it."""
        return self._make_call(self._remaining_s())

    def pause_s(self, error: grpc.RpcError) -> float | None:
        """How long to wait before the next attempt; None if the failure is to stand."""
        if error.code() not in _NOT_HEARD_OF or not self._pauses_s:
            return None
        pause_s = self._pauses_s.pop(0)
        remaining_s = self._remaining_s()
        return pause_s if remaining_s is None or remaining_s > pause_s else None

    def _remaining_s(self) -> float | None:
        return None if self._ends_at is None else max(0.0, self._ends_at - time.monotonic())
