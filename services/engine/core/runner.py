"""Runs one plan: builds the flattened batch, calls the model, samples, verifies drafts."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from services.engine.core.batch import ForwardBatch
from services.engine.core.clock import now_ns
from services.engine.core.logit_edits import LogitEdits
from services.engine.core.noise import uniforms
from services.engine.core.plan import Plan, SequenceOutput, StepOutputs
from services.engine.core.sampler import SampledTokens, SamplingBatch, sample
from services.engine.core.sequence_rows import SequenceRows
from services.engine.core.speculation.verification import verify
from services.engine.core.staging import Staging

# (batch, kv_cache) -> logits [num_rows, vocab] float32
Model: TypeAlias = Callable[[ForwardBatch, Any], Tensor]

_NO_OUTPUT = SequenceOutput()


@dataclass(frozen=True, slots=True)
class _Sampled:
    """Which planned sequences a step samples from: `num_rows[i]` times from `indices[i]`."""

    indices: npt.NDArray[np.int64]
    num_rows: npt.NDArray[np.int64] | None  # None: once from each


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
            logits = self._model(batch, self._kv_cache)
            tokens = self._sample(plan, drafts, sampled, logits)
        outputs = _outputs(len(plan.sequences), drafts, sampled, tokens)
        return StepOutputs(plan, outputs, started_ns, now_ns())

    def _batch(
        self, plan: Plan, drafts: tuple[tuple[int, ...], ...] | None
    ) -> tuple[ForwardBatch, _Sampled]:
        sequences = plan.sequences
        num_sequences = len(sequences)
        widest = max(map(self._rows.refresh, sequences))
        counts = np.array(plan.token_counts, np.int64)
        rows = np.fromiter((s.row for s in sequences), np.int64, num_sequences)
        computed = np.fromiter((s.num_computed_tokens for s in sequences), np.int64, num_sequences)
        known = np.fromiter((len(s.token_ids) for s in sequences), np.int64, num_sequences)
        after = computed + counts
        ends = counts.cumsum()
        total = int(ends[-1])
        indices = np.flatnonzero(after >= known)
        sampled = _Sampled(indices, None if drafts is None else (after - known)[indices] + 1)

        integers = self._integers.host
        token_ids, positions, slots = integers[: 3 * total].reshape(3, total)
        if total == num_sequences:
            owner = rows
            positions[:] = computed
        else:
            owner = np.repeat(rows, counts)
            # Position = tokens computed before + offset within the sequence's share of the batch.
            positions[:] = np.arange(total) + np.repeat(after - ends, counts)
        tables = self._rows.block_tables
        np.multiply(tables[owner, positions // self._block_size], self._block_size, out=slots)
        slots += positions % self._block_size
        _fill_token_ids(token_ids, plan, drafts)
        logits_rows = ends[indices] - 1
        if sampled.num_rows is not None:
            logits_rows = _runs_up_to(logits_rows, sampled.num_rows)
        num_integers = 3 * total + len(logits_rows)
        integers[3 * total : num_integers] = logits_rows
        packed = self._integers.to_device(num_integers)

        num_entries = num_sequences * widest
        self._tables.host[:num_entries].reshape(num_sequences, widest)[:] = tables[rows, :widest]
        batch = ForwardBatch(
            token_ids=packed[:total],
            positions=packed[total : 2 * total],
            slots=packed[2 * total : 3 * total],
            block_tables=self._tables.to_device(num_entries).view(num_sequences, widest),
            query_lengths=plan.token_counts,
            context_lengths=tuple(after.tolist()),
            logits_rows=packed[3 * total :],
        )
        return batch, sampled

    def _sample(
        self,
        plan: Plan,
        drafts: tuple[tuple[int, ...], ...] | None,
        sampled: _Sampled,
        logits: Tensor,
    ) -> SampledTokens:
        indices = sampled.indices.tolist()
        if not indices:
            return SampledTokens([], [], [])
        chosen = [plan.sequences[index] for index in indices]
        rows = np.fromiter((s.row for s in chosen), np.int64, len(chosen))
        positions = np.fromiter((s.num_output_tokens for s in chosen), np.int64, len(chosen))
        if sampled.num_rows is not None:
            rows = np.repeat(rows, sampled.num_rows)
            positions = _runs_up_to(positions + sampled.num_rows - 1, sampled.num_rows)
        state = self._rows
        edits = None
        if any(state.has_edits[s.row] for s in chosen):
            edits = LogitEdits()
            row = 0
            for index, sequence in zip(indices, chosen, strict=True):
                draft = () if drafts is None else drafts[index]
                if state.has_edits[sequence.row]:
                    counts = state.token_counts(sequence)
                    for length in range(len(draft) + 1):
                        edits.add(row + length, sequence, counts, draft[:length])
                row += len(draft) + 1
        return sample(
            logits,
            SamplingBatch(
                temperature=state.temperature[rows],
                top_k=state.top_k[rows],
                top_p=state.top_p[rows],
                min_p=state.min_p[rows],
                uniforms=uniforms(state.noise_key[rows], positions),
                logprobs=state.logprobs[rows],
                edits=edits,
            ),
        )


def _outputs(
    num_sequences: int,
    drafts: tuple[tuple[int, ...], ...] | None,
    sampled: _Sampled,
    tokens: SampledTokens,
) -> tuple[SequenceOutput, ...]:
    outputs = [_NO_OUTPUT] * num_sequences
    row = 0
    for index in sampled.indices.tolist():
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


def _runs_up_to(
    lasts: npt.NDArray[np.int64], lengths: npt.NDArray[np.int64]
) -> npt.NDArray[np.int64]:
    """For each i the `lengths[i]` consecutive numbers that end with `lasts[i]`, one after another.

    >>> _runs_up_to(np.array([4, 9]), np.array([3, 1])).tolist()
    [2, 3, 4, 9]
    """
    ends = lengths.cumsum()
    runs: npt.NDArray[np.int64] = np.repeat(lasts + 1 - ends, lengths)
    runs += np.arange(len(runs))
    return runs


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
