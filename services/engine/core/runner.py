"""Runs one plan: builds the flattened batch, calls the model, samples, verifies drafts."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import accumulate
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from services.engine.core.batch import ForwardBatch
from services.engine.core.clock import now_ns
from services.engine.core.logit_edits import LogitEdits
from services.engine.core.plan import Plan, SequenceOutput, StepOutputs
from services.engine.core.sampler import SampledTokens, SamplingBatch, sample
from services.engine.core.sequence_rows import SequenceRows
from services.engine.core.speculation.verification import verify
from services.engine.core.staging import Staging

# (batch, kv_cache) -> logits [num_rows, vocab] float32
Model: TypeAlias = Callable[[ForwardBatch, Any], Tensor]

_NO_OUTPUT = SequenceOutput()
_NO_TOKENS = SampledTokens([], [], [])


@dataclass(frozen=True, slots=True)
class _Sampled:
    """Which planned sequences a step samples from: `num_rows[i]` times from `indices[i]`."""

    indices: list[int]
    num_rows: list[int] | None  # None: once from each


class Runner:
    """Turns plans into outputs; owns the buffers through which a batch reaches the device."""

    def __init__(
        self,
        model: Model,
        kv_cache: Any,
        *,
        device: torch.device,
        block_size: int,
        max_batch_tokens: int,
        max_running_sequences: int,
        max_context_tokens: int,
    ) -> None:
        self._model = model
        self._kv_cache = kv_cache
        self._block_size = block_size
        max_blocks = -(-max_context_tokens // block_size)
        self._rows = SequenceRows(max_running_sequences, max_blocks)
        # Token ids, positions, slots and logits rows, packed one after the other.
        self._integers = Staging(4 * max_batch_tokens, np.int64, device)
        self._tables = Staging(max_running_sequences * max_blocks, np.int32, device)

    def run(self, plan: Plan) -> StepOutputs:
        """Compute the planned tokens and sample from every sequence whose last token is computed.

        The K and V of the planned tokens are in the cache afterwards. Running the same plan again
        is harmless: it writes the same values to the same slots.
        """
        started_ns = now_ns()
        with torch.inference_mode():
            if plan.block_copies:
                self._kv_cache.copy_blocks(plan.block_copies)
            drafts = plan.drafts()
            batch, sampled = self._batch(plan, drafts)
            sampling = self._sampling(plan, drafts, sampled)
            logits = self._model(batch, self._kv_cache)
            tokens = _NO_TOKENS if sampling is None else sample(logits, sampling)
        outputs = _outputs(len(plan.sequences), drafts, sampled, tokens)
        return StepOutputs(plan, outputs, started_ns, now_ns())

    def _batch(
        self, plan: Plan, drafts: tuple[tuple[int, ...], ...] | None
    ) -> tuple[ForwardBatch, _Sampled]:
        sequences, counts = plan.sequences, plan.token_counts
        num_sequences = len(sequences)
        widest = max(map(self._rows.refresh, sequences))
        rows = [sequence.row for sequence in sequences]
        computed = [sequence.num_computed_tokens for sequence in sequences]
        contexts = [before + count for before, count in zip(computed, counts, strict=True)]
        beyond = [
            context - len(sequence.token_ids)
            for context, sequence in zip(contexts, sequences, strict=True)
        ]
        ends = list(accumulate(counts))
        total = ends[-1]
        indices = [index for index, ahead in enumerate(beyond) if ahead >= 0]
        if drafts is None:
            sampled = _Sampled(indices, None)
            wanted = [ends[index] - 1 for index in indices]
        else:
            sampled = _Sampled(indices, [beyond[index] + 1 for index in indices])
            wanted = [
                row
                for index in indices
                for row in range(ends[index] - beyond[index] - 1, ends[index])
            ]

        token_ids, positions, slots, logits_rows = self._integers.cut(
            (total,), (total,), (total,), (len(wanted),)
        )
        logits_rows[:] = wanted
        _fill_token_ids(token_ids, plan, drafts)
        if total == num_sequences:
            owners = np.array(rows)
            positions[:] = computed
        else:
            owners = np.repeat(rows, counts)
            # What a token's position and its place in the batch differ by is its sequence's own.
            positions[:] = np.arange(total) + np.repeat(np.subtract(contexts, ends), counts)
        tables = self._rows.block_tables
        np.multiply(tables[owners, positions // self._block_size], self._block_size, out=slots)
        slots += positions % self._block_size
        (block_tables,) = self._tables.cut((num_sequences, widest))
        block_tables[:] = tables[rows, :widest]

        token_ids_there, positions_there, slots_there, rows_there = self._integers.to_device()
        (tables_there,) = self._tables.to_device()
        batch = ForwardBatch(
            token_ids=token_ids_there,
            positions=positions_there,
            slots=slots_there,
            block_tables=tables_there,
            query_lengths=counts,
            context_lengths=tuple(contexts),
            logits_rows=rows_there,
        )
        return batch, sampled

    def _sampling(
        self, plan: Plan, drafts: tuple[tuple[int, ...], ...] | None, sampled: _Sampled
    ) -> SamplingBatch | None:
        if not sampled.indices:
            return None
        state = self._rows
        chosen = [plan.sequences[index] for index in sampled.indices]
        rows = [sequence.row for sequence in chosen]
        if all(state.is_greedy[row] for row in rows):
            num_rows = len(rows) if sampled.num_rows is None else sum(sampled.num_rows)
            return SamplingBatch.greedy(num_rows)
        edits = None
        if any(state.has_edits[row] for row in rows):
            edits = LogitEdits()
            first = 0
            for index, sequence in zip(sampled.indices, chosen, strict=True):
                draft = () if drafts is None else drafts[index]
                if state.has_edits[sequence.row]:
                    counts = state.token_counts(sequence)
                    for length in range(len(draft) + 1):
                        edits.add(first + length, sequence, counts, draft[:length])
                first += len(draft) + 1
        positions = np.array([sequence.num_output_tokens for sequence in chosen])
        repeated = np.array(rows)
        if sampled.num_rows is not None:
            lengths = np.array(sampled.num_rows)
            repeated = repeated.repeat(lengths)
            # From the next token of each sequence on, one after the other.
            firsts = positions - lengths.cumsum() + lengths
            positions = np.arange(len(repeated)) + firsts.repeat(lengths)
        return state.sampling(repeated, positions, edits)


def _outputs(
    num_sequences: int,
    drafts: tuple[tuple[int, ...], ...] | None,
    sampled: _Sampled,
    tokens: SampledTokens,
) -> tuple[SequenceOutput, ...]:
    outputs = [_NO_OUTPUT] * num_sequences
    row = 0
    for index in sampled.indices:
        if drafts is not None and drafts[index]:
            outputs[index] = verify(drafts[index], tokens, row)
            row += len(drafts[index]) + 1
            continue
        error, logprobs = tokens.errors[row], tokens.logprobs[row]
        outputs[index] = SequenceOutput(
            () if error else (tokens.token_ids[row],),
            () if logprobs is None else (logprobs,),
            error,
        )
        row += 1
    return tuple(outputs)


def _fill_token_ids(
    target: npt.NDArray[np.int64], plan: Plan, drafts: tuple[tuple[int, ...], ...] | None
) -> None:
    position = 0
    for index, (sequence, count) in enumerate(zip(plan.sequences, plan.token_counts, strict=True)):
        start = sequence.num_computed_tokens
        if count == 1:
            target[position] = sequence.token_ids[start]
        else:
            share = sequence.token_ids[start : start + count]
            drafted = position + len(share)
            target[position:drafted] = np.frombuffer(share, np.int64)
            if drafts is not None:
                target[drafted : position + count] = drafts[index]
        position += count
