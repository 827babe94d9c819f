"""The sequences that run: their order, their rows, their blocks."""

from __future__ import annotations

from collections.abc import Iterator

from services.engine.core.block_tables import BlockTables
from services.engine.core.clock import now_ns
from services.engine.core.errors import IntegrityError
from services.engine.core.prefix_cache import Match
from services.engine.core.sequence import Sequence, SequenceState


class RunningSet:
    """Running sequences, best rank (priority, then arrival) first.

    Each owns a row, the place of its buffers in the runner, and the blocks of its table, from
    `enter` to `leave`.
    """

    def __init__(self, tables: BlockTables, max_sequences: int) -> None:
        self._pool = tables.pool
        self._tables = tables
        self._max_sequences = max_sequences
        self._free_rows = list(range(max_sequences - 1, -1, -1))
        self.sequences: list[Sequence] = []

    def __len__(self) -> int:
        return len(self.sequences)

    def __iter__(self) -> Iterator[Sequence]:
        return iter(self.sequences)

    def missing_blocks(self, sequence: Sequence, match: Match) -> int:
        """How many blocks more must be free before `sequence` may enter with `match`.

        It may if all tokens it knows fit and one row per running sequence stays free, so that its
        entry does not cause a preemption in the very next steps.
        """
        needed = self._tables.blocks_to_enter(sequence, match)
        spared = len(self.sequences) * self._tables.shape.num_groups
        return needed + spared - self._pool.num_free

    def enter(self, sequence: Sequence, match: Match) -> list[tuple[int, int]]:
        """Let a waiting sequence run; returns the blocks to copy for it, as BlockTables does."""
        copies = self._tables.enter(sequence, match)
        sequence.row = self._free_rows.pop()
        if sequence.admissions:
            sequence.resume(now_ns())
        sequence.admissions += 1
        sequence.state = SequenceState.RUNNING
        # Nearly always at the end: those who wait rank behind those who run, but for priorities.
        index = len(self.sequences)
        while index and self.sequences[index - 1].rank > sequence.rank:
            index -= 1
        self.sequences.insert(index, sequence)
        return copies

    def leave(self, sequence: Sequence) -> None:
        """Take a running sequence out, and its row and blocks from it."""
        self.sequences.remove(sequence)
        self._tables.leave(sequence)
        sequence.draft_token_ids = ()
        self._free_rows.append(sequence.row)
        sequence.row = -1

    def check_integrity(self) -> None:
        """Check order and rows, and that the pool's blocks are held by the running sequences.

        Raises:
            IntegrityError: something does not hold.
        """
        if any(sequence.state is not SequenceState.RUNNING for sequence in self.sequences):
            raise IntegrityError("the running list holds a sequence that does not run")
        ranks = [sequence.rank for sequence in self.sequences]
        if ranks != sorted(ranks):
            raise IntegrityError("the running list is out of order")
        rows = [*self._free_rows, *(sequence.row for sequence in self.sequences)]
        if sorted(rows) != list(range(self._max_sequences)):
            raise IntegrityError("a row is lost or shared")
        self._pool.check_integrity(sequence.held_blocks for sequence in self.sequences)
