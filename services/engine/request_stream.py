"""What the core has said about one request and its reader has not yet taken."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Protocol

from services.engine.core.messages import Delta, FinishReason


class CoreUnavailableError(Exception):
    """There is no core that could take a request now."""


class CoreLostError(Exception):
    """The core ended while it worked on the request."""


class RefusedError(Exception):
    """The core refused the request; `kind` is the name of its AdmissionError."""

    def __init__(self, kind: str, message: str) -> None:
        super().__init__(message)
        self.kind = kind


class Forget(Protocol):
    """Told when sequences have ended, or must be aborted for their reader has gone."""

    def __call__(self, sequence_ids: list[int], *, abort: bool) -> None: ...


class RequestStream:
    """The deltas of one request's sequences, which accrue until they are read.

    One reader. Leaving it, by `close` or as a context manager, aborts what has not ended; nothing
    that arrives later is kept.
    """

    def __init__(self, sequence_ids: list[int], forget: Forget) -> None:
        self.sequence_ids = tuple(sequence_ids)  # by choice
        self.was_aborted = False
        # Sequences that the caller gave up while it wants the others: their end is no failure.
        self.withdrawn: set[int] = set()
        self._live = set(sequence_ids)
        self._forget = forget
        self._accrued: list[Delta] = []
        self._error: Exception | None = None
        self._something = asyncio.Event()

    @property
    def live_sequence_ids(self) -> list[int]:
        """The sequences that have not ended."""
        return sorted(self._live)

    def __enter__(self) -> RequestStream:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def withdraw(self, choices: Sequence[int]) -> list[int]:
        """The live sequences of these choices, which from now on may end without failing the
        request. Choices that have ended, or never were, are passed over."""
        sequence_ids = [
            self.sequence_ids[choice]
            for choice in choices
            if choice < len(self.sequence_ids) and self.sequence_ids[choice] in self._live
        ]
        self.withdrawn.update(sequence_ids)
        return sequence_ids

    def accrue(self, delta: Delta) -> None:
        """Keep a delta for the reader."""
        self._accrued.append(delta)
        if delta.finish is not None:
            self.was_aborted |= (
                delta.finish.reason is FinishReason.ABORTED
                and delta.sequence_id not in self.withdrawn
            )
            self._live.discard(delta.sequence_id)
            self._forget([delta.sequence_id], abort=False)
        self._something.set()

    def fail(self, error: Exception) -> None:
        """End the stream with an error, after what has accrued."""
        self._error = error
        self._let_go(abort=False)
        self._something.set()

    async def read(self) -> list[Delta]:
        """All deltas since the last call, at least one; empty once every sequence has ended.

        Raises:
            RefusedError: the core did not take the request.
            CoreLostError: the core ended.
        """
        while not self._accrued:
            if self._error is not None:
                raise self._error
            if not self._live:
                return []
            self._something.clear()
            await self._something.wait()
        accrued, self._accrued = self._accrued, []
        return accrued

    def close(self) -> None:
        """Abort what has not ended."""
        self._let_go(abort=True)

    def _let_go(self, *, abort: bool) -> None:
        if self._live:
            live, self._live = list(self._live), set()
            self._forget(live, abort=abort)
