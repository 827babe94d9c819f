"""The bounded queue of sequences that wait for their turn."""

from __future__ import annotations

import bisect
from collections.abc import Iterator

from services.engine.core.errors import IntegrityError
from services.engine.core.sequence import Sequence, SequenceState


def _rank(sequence: Sequence) -> tuple[int, int]:
    return sequence.rank


class WaitingQueue:
    """Waiting sequences, best rank (highest priority, then earliest arrival) first.

    A preempted sequence comes back under the rank it always had, so it keeps its place. The bound
    holds for newcomers only: what was admitted once is never refused later.
    """

    def __init__(self) -> None:
        self._sequences: list[Sequence] = []

    def __len__(self) -> int:
        return len(self._sequences)

    def __iter__(self) -> Iterator[Sequence]:
        return iter(self._sequences)

    @property
    def head(self) -> Sequence | None:
        """The sequence whose turn is next, or None if nobody waits."""
        return self._sequences[0] if self._sequences else None

    def push(self, sequence: Sequence) -> None:
        """Let a sequence wait, at its rank."""
        bisect.insort(self._sequences, sequence, key=_rank)

    def pop(self) -> Sequence:
        """Take the head out. Precondition: the queue is not empty."""
        return self._sequences.pop(0)

    def remove(self, sequence: Sequence) -> None:
        """Take a sequence out wherever it stands. Precondition: it waits here."""
        index = bisect.bisect_left(self._sequences, sequence.rank, key=_rank)
        if index == len(self._sequences) or self._sequences[index] is not sequence:
            raise IntegrityError(f"sequence {sequence.sequence_id} is not in the waiting queue")
        del self._sequences[index]

    def check_integrity(self) -> None:
        """Check that the queue is in order and holds only waiting sequences.

        Raises:
            IntegrityError: it does not.
        """
        ranks = [sequence.rank for sequence in self._sequences]
        if ranks != sorted(set(ranks)):
            raise IntegrityError("the waiting queue is out of order")
        if any(sequence.state is not SequenceState.WAITING for sequence in self._sequences):
            raise IntegrityError("the waiting queue holds a sequence that does not wait")
