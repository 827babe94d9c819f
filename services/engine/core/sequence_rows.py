"""What the runner keeps of each running sequence, in arrays from step to step."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from services.engine.core.logit_edits import LogitEdits, counts_tokens, has_edits
from services.engine.core.noise import stream_key, uniforms
from services.engine.core.sampler import SamplingBatch
from services.engine.core.sequence import Sequence
from services.engine.core.token_counts import TokenCounts


@dataclass(frozen=True, slots=True)
class TableChange:
    """Entries of a row's block table that are new, of all groups: from `begin` to `end`."""

    row: int
    begin: int
    end: int


class SequenceRows:
    """The block table and the sampling numbers of every running sequence, one row for each.

    Row r belongs to the running sequence whose `row` is r, from the step that first sees it there
    until another sequence (or another admission of the same one) shows up at r. Nobody has to
    announce departures, so the mirror cannot fall out of step with the scheduler.

    `block_tables` is [num_rows, max_blocks], or [num_groups, num_rows, max_blocks] where there are
    several groups of layers.
    """

    def __init__(
        self, num_rows: int, max_blocks: int, num_groups: int = 1, *, notes_changes: bool = False
    ) -> None:
        """notes_changes: of the block tables, for who mirrors them elsewhere."""
        shape = (num_rows, max_blocks)
        self.num_groups = num_groups
        self.block_tables = np.zeros(shape if num_groups == 1 else (num_groups, *shape), np.int32)
        self.has_edits = [False] * num_rows
        # Whether these hang on which tokens there are, by more than their counts.
        self.reads_text = [False] * num_rows
        self.is_greedy = [True] * num_rows  # the likeliest token and nothing else is wanted
        self.is_plain = [True] * num_rows  # one token is wanted, of logits as they are
        self._temperature = np.zeros(num_rows, np.float32)
        self._top_k = np.zeros(num_rows, np.int64)
        self._top_p = np.ones(num_rows, np.float32)
        self._min_p = np.zeros(num_rows, np.float32)
        self._noise_key = np.zeros(num_rows, np.uint64)
        self._logprobs = np.full(num_rows, -1, np.int64)
        self._token_counts: list[TokenCounts | None] = [None] * num_rows
        self._tenant: list[tuple[int, int] | None] = [None] * num_rows
        self._num_blocks = [0] * num_rows
        self._changes: list[TableChange] | None = [] if notes_changes else None

    def refresh(self, sequence: Sequence) -> int:
        """Bring the row of `sequence` up to date; returns the number of its blocks, of a group.

        While a sequence runs, its block table only grows; that it lacks blocks which nobody reads
        any more does not matter.
        """
        row = sequence.row
        # Not the sequence's id, which its front may use again once the sequence has ended.
        tenant = (sequence.arrival, sequence.admissions)
        if self._tenant[row] != tenant:
            self._tenant[row] = tenant
            self._move_in(row, sequence)
        blocks = sequence.block_table
        mirrored = self._num_blocks[row]
        if len(blocks) != mirrored:
            new, place = blocks[mirrored:], slice(mirrored, len(blocks))
            if self.num_groups > 1:
                columns = np.array(new).reshape(-1, self.num_groups).T
                place = slice(mirrored // self.num_groups, len(blocks) // self.num_groups)
                self.block_tables[:, row, place] = columns
            else:
                self.block_tables[row, place] = new
            self._num_blocks[row] = len(blocks)
            if self._changes is not None:
                begin, end = mirrored // self.num_groups, len(blocks) // self.num_groups
                self._changes.append(TableChange(row, begin, end))
        return len(blocks) // self.num_groups

    def take_changes(self) -> list[TableChange]:
        """What is new in the block tables since this was last asked."""
        changes, self._changes = self._changes or [], []
        return changes

    def sampling(
        self,
        rows: npt.NDArray[np.int64],
        positions: npt.NDArray[np.int64],
        edits: LogitEdits | None,
    ) -> SamplingBatch:
        """How output tokens number `positions` of the sequences in `rows` are sampled."""
        return SamplingBatch(
            temperature=self._temperature[rows],
            top_k=self._top_k[rows],
            top_p=self._top_p[rows],
            min_p=self._min_p[rows],
            uniforms=uniforms(self._noise_key[rows], positions),
            logprobs=self._logprobs[rows],
            edits=edits,
        )

    def token_counts(self, sequence: Sequence) -> TokenCounts | None:
        """The counts of all known tokens of `sequence`, where its sampling needs them."""
        counts = self._token_counts[sequence.row]
        if counts is not None:
            counts.advance(sequence.token_ids, sequence.num_prompt_tokens)
        return counts

    def _move_in(self, row: int, sequence: Sequence) -> None:
        sampling = sequence.sampling
        self._num_blocks[row] = 0
        self.block_tables[..., row, :] = 0
        self._temperature[row] = sampling.temperature
        self._top_k[row] = sampling.top_k
        self._top_p[row] = sampling.top_p
        self._min_p[row] = sampling.min_p
        self._noise_key[row] = stream_key(sampling.seed, sequence.request.choice_index)
        self._logprobs[row] = -1 if sampling.logprobs is None else sampling.logprobs
        self._token_counts[row] = TokenCounts() if counts_tokens(sampling) else None
        # A rule's mask depends on what was said before, as processors do.
        self.reads_text[row] = bool(sequence.matcher or sampling.logits_processors)
        self.has_edits[row] = (
            has_edits(sampling)
            or sequence.request.stopping.min_tokens > 0
            or sequence.matcher is not None
        )
        self.is_plain[row] = sampling.logprobs is None and not self.has_edits[row]
        self.is_greedy[row] = sampling.temperature == 0 and self.is_plain[row]
