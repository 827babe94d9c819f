"""Tells how much of a model's weights has been read, while that takes longer than a moment."""

from __future__ import annotations

import logging
import time

logger = logging.getLogger(__name__)

_INTERVAL_S = 1.0


class ReadingProgress:
    """Counts the bytes that are read of a checkpoint, and logs now and then how far it is.

    A record has the share that is done, from 0 to 1, as its `progress`, for those who show it
    elsewhere; see `messages.Log`.
    """

    def __init__(self, num_bytes: int) -> None:
        self._num_bytes = num_bytes
        self._done_bytes = 0
        self._said_s = time.monotonic()

    def add(self, num_bytes: int) -> None:
        """Count what is being read."""
        self._done_bytes += num_bytes

    def report(self) -> None:
        """Say how far it is, unless that was said a moment ago or all has been read."""
        now_s = time.monotonic()
        if now_s - self._said_s < _INTERVAL_S or self._done_bytes >= self._num_bytes:
            return
        self._said_s = now_s
        share = self._done_bytes / self._num_bytes
        logger.info(
            "weights read: %.0f %% of %.0f MiB",
            100 * share,
            self._num_bytes / 2**20,
            extra={"progress": share},
        )
