"""What the core has said about one request and its reader has not yet taken."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from typing import Protocol

from services.engine.core.messages import Delta, FinishReason
from services.engine.pacing import Pacer


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

    One reader, which is told when it is time to read: at once of the first tokens and the end of a
    sequence, as the pacer has it of the rest. Leaving it, by `close` or as a context manager,
    aborts what has not ended; nothing that arrives later is kept.
    """

    def __init__(self, sequence_ids: list[int], forget: Forget, pacer: Pacer) -> None:
        self.sequence_ids = tuple(sequence_ids)  # by choice
        self.was_aborted = False
        # Sequences that the caller gave up while it wants the others: their end is no failure.
        self.withdrawn: set[int] = set()
        self._live = set(sequence_ids)
        self._forget = forget
        self._accrued: list[Delta] = []
        self._error: Exception | None = None
        self._pacer = pacer
        self._waits = False
        self._due = asyncio.Event()
        # Called when it is time to read.
        self.on_due: Callable[[], None] = self._due.set

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
        # Timing facts come with a first token and with an end.
        if delta.timing is not None or delta.finish is not None:
            self.on_due()
        elif not self._waits:
            self._waits = True
            self._pacer.wait(self._become_due)

    def fail(self, error: Exception) -> None:
        """End the stream with an error, after what has accrued."""
        self._error = error
        self._let_go(abort=False)
        self.on_due()

    def take(self) -> list[Delta]:
        """All deltas since the last call, without waiting for any."""
        accrued, self._accrued = self._accrued, []
        return accrued

    @property
    def is_over(self) -> bool:
        """Whether every sequence has ended and nothing is left to take."""
        return not self._live and not self._accrued

    def raise_failure(self) -> None:
        """Raise what the stream failed with, once what accrued before has been taken.

        Raises:
            RefusedError: the core did not take the request.
            CoreLostError: the core ended.
        """
        if self._error is not None and not self._accrued:
            raise self._error

    async def read(self) -> list[Delta]:
        """All deltas since the last call, at least one; empty once every sequence has ended.

        Raises:
            RefusedError: the core did not take the request.
            CoreLostError: the core ended.
        """
        while True:
            if not self._accrued:
                self.raise_failure()
                if not self._live:
                    return []
            await self._due.wait()
            self._due.clear()
            if self._accrued:
                return self.take()

    def _become_due(self) -> None:
        self._waits = False
        if self._accrued:
            self.on_due()

    def close(self) -> None:
        """Abort what has not ended."""
        self._let_go(abort=True)

    def _let_go(self, *, abort: bool) -> None:
        if self._live:
            live, self._live = list(self._live), set()
            self._forget(live, abort=abort)
