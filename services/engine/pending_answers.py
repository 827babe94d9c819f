"""What the core has answered to one request to an encoder, until all of it is there."""

from __future__ import annotations

import asyncio
import time
from dataclasses import dataclass

from services.engine.core.messages import Answer
from services.engine.request_stream import Forget


class AbortedError(Exception):
    """Another call ended the request."""


class SequenceFailedError(Exception):
    """The computation of one sequence failed; `index` is its place, `kind` the error's type."""

    def __init__(self, index: int, kind: str, message: str) -> None:
        super().__init__(message)
        self.index, self.kind = index, kind


@dataclass(frozen=True, slots=True)
class Answers:
    """The answers of a request's sequences, in order, and when its last batch ended."""

    answers: list[Answer]
    ended_ns: int


class PendingAnswers:
    """Gathers the answers of one request's sequences.

    Leaving it, by `close` or as a context manager, takes from the core what has not been answered.
    """

    def __init__(self, sequence_ids: list[int], forget: Forget) -> None:
        self.was_aborted = False
        self._sequence_ids = sequence_ids
        self._answers: dict[int, Answer] = {}
        self._live = set(sequence_ids)
        self._forget = forget
        self._ended_ns = 0
        self._outcome: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self.submitted_ns = time.time_ns()

    @property
    def live_sequence_ids(self) -> list[int]:
        """The sequences that have not been answered."""
        return sorted(self._live)

    def __enter__(self) -> PendingAnswers:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def accrue(self, answer: Answer, ended_ns: int) -> None:
        """Keep an answer. One that failed fails the request at once."""
        self._answers[answer.sequence_id] = answer
        self._live.discard(answer.sequence_id)
        self._ended_ns = ended_ns
        self._forget([answer.sequence_id], abort=False)
        if answer.error_kind:
            index = self._sequence_ids.index(answer.sequence_id)
            self.fail(SequenceFailedError(index, answer.error_kind, answer.error))
        elif not self._live and not self._outcome.done():
            self._outcome.set_result(None)

    def fail(self, error: Exception) -> None:
        """End the request with an error."""
        if not self._outcome.done():
            self._outcome.set_exception(error)

    def abort(self) -> None:
        """End the request for another call asks for it."""
        self.was_aborted = not self._outcome.done()
        self.fail(AbortedError("the request was aborted by another call"))
        self.close()

    async def wait(self) -> Answers:
        """All answers.

        Raises:
            RefusedError: the core did not take the request.
            CoreLostError: the core ended.
            SequenceFailedError: the computation of a sequence failed.
            AbortedError: another call ended the request.
        """
        await self._outcome
        return Answers([self._answers[each] for each in self._sequence_ids], self._ended_ns)

    def close(self) -> None:
        """Take from the core what has not been answered."""
        if not self._outcome.done():
            self._outcome.cancel()
        elif not self._outcome.cancelled():
            self._outcome.exception()  # nobody may be left to be told
        if self._live:
            live, self._live = list(self._live), set()
            self._forget(live, abort=True)
