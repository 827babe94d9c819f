"""Runs one plan: builds the flattened batch, calls the model, samples."""

from __future__ import annotations

from array import array
from collections.abc import Callable
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from services.engine.core.batch import ForwardBatch
from services.engine.core.clock import now_ns
from services.engine.core.logit_edits import LogitEdits, has_edits
from services.engine.core.noise import stream_key, uniforms
from services.engine.core.plan import Plan, SequenceOutput, StepOutputs
from services.engine.core.sampler import SampledTokens, SamplingBatch, sample
from services.engine.core.sequence import Sequence

# (batch, kv_cache) -> logits [num_rows, vocab] float32
Model: TypeAlias = Callable[[ForwardBatch, Any], Tensor]

_NO_OUTPUT = SequenceOutput()


class _SequenceRows:
    """What a step needs of each running sequence, kept in arrays from step to step.

    Row r belongs to the running sequence whose `row` is r, from the step that first sees it there
    until another sequence (or another admission of the same one) shows up at r. Nobody has to
    announce departures, so the mirror cannot fall out of step with the scheduler.
    """

    def __init__(self, num_rows: int, max_blocks: int) -> None:
        self.block_tables = np.zeros((num_rows, max_blocks), np.int32)
        self.temperature = np.zeros(num_rows, np.float32)
        self.top_k = np.zeros(num_rows, np.int64)
        self.top_p = np.ones(num_rows, np.float32)
        self.min_p = np.zeros(num_rows, np.float32)
        self.noise_key = np.zeros(num_rows, np.uint64)
        self.logprobs = np.full(num_rows, -1, np.int64)
        self.has_edits = [False] * num_rows
        self._tenant: list[tuple[int, int] | None] = [None] * num_rows
        self._num_blocks = [0] * num_rows

    def refresh(self, sequence: Sequence) -> int:
        """Bring the row of `sequence` up to date; returns the number of its blocks."""
        row = sequence.row
        # Not the sequence's id, which its front may use again once the sequence has ended.
        tenant = (sequence.arrival, sequence.admissions)
        if self._tenant[row] != tenant:
            self._tenant[row] = tenant
            self._move_in(row, sequence)
        blocks = sequence.block_table
        mirrored = self._num_blocks[row]
        if len(blocks) != mirrored:
            self.block_tables[row, mirrored : len(blocks)] = blocks[mirrored:]
            self._num_blocks[row] = len(blocks)
        return len(blocks)

    def _move_in(self, row: int, sequence: Sequence) -> None:
        sampling = sequence.sampling
        self._num_blocks[row] = 0
        self.block_tables[row] = 0
        self.temperature[row] = sampling.temperature
        self.top_k[row] = sampling.top_k
        self.top_p[row] = sampling.top_p
        self.min_p[row] = sampling.min_p
        self.noise_key[row] = stream_key(sampling.seed, sequence.request.choice_index)
        self.logprobs[row] = -1 if sampling.logprobs is None else sampling.logprobs
        self.has_edits[row] = has_edits(sampling) or sequence.request.stopping.min_tokens > 0


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
        self._rows = _SequenceRows(max_running_sequences, max_blocks)
        # Token ids, positions, slots and logits rows, packed one after the other.
        self._integers = _Staging(3 * max_batch_tokens + max_running_sequences, np.int64, device)
        self._tables = _Staging(max_running_sequences * max_blocks, np.int32, device)

    def run(self, plan: Plan) -> StepOutputs:
        """Compute the planned tokens and sample from every sequence whose last token is computed.

        The K and V of the planned tokens are in the cache afterwards. Running the same plan again
        is harmless: it writes the same values to the same slots.
        """
        started_ns = now_ns()
        with torch.inference_mode():
            batch, sampled = self._batch(plan)
            logits = self._model(batch, self._kv_cache)
            tokens = self._sample(plan, sampled, logits)
        outputs = [_NO_OUTPUT] * len(plan.sequences)
        for row, index in enumerate(sampled.tolist()):
            logprobs = tokens.logprobs[row]
            outputs[index] = SequenceOutput(
                () if tokens.errors[row] else (tokens.token_ids[row],),
                () if logprobs is None else (logprobs,),
                tokens.errors[row],
            )
        return StepOutputs(plan, tuple(outputs), started_ns, now_ns())

    def _batch(self, plan: Plan) -> tuple[ForwardBatch, npt.NDArray[np.int64]]:
        """The flattened batch, and the indices of the planned sequences that are sampled from."""
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
        sampled = np.flatnonzero(after == known)

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
        _fill_token_ids(token_ids, plan)
        num_integers = 3 * total + len(sampled)
        integers[3 * total : num_integers] = ends[sampled] - 1
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

    def _sample(self, plan: Plan, sampled: npt.NDArray[np.int64], logits: Tensor) -> SampledTokens:
        if not len(sampled):
            return SampledTokens([], [], [])
        chosen = [plan.sequences[index] for index in sampled.tolist()]
        rows = np.fromiter((s.row for s in chosen), np.int64, len(chosen))
        positions = np.fromiter((s.num_output_tokens for s in chosen), np.int64, len(chosen))
        state = self._rows
        edits = None
        if any(state.has_edits[s.row] for s in chosen):
            edits = LogitEdits()
            for row, sequence in enumerate(chosen):
                if state.has_edits[sequence.row]:
                    edits.add(row, sequence)
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


class _Staging:
    """A host array and its twin on the device. On a CPU they share their memory.

    One step at a time is in flight: sampling waits for the device, so the host array may be filled
    again as soon as a step has returned.
    """

    def __init__(self, size: int, dtype: Any, device: torch.device) -> None:
        if device.type == "cpu":
            self.host = np.zeros(size, dtype)
            self._source = self._device = torch.from_numpy(self.host)
        else:
            torch_dtype = torch.from_numpy(np.zeros(0, dtype)).dtype
            self._source = torch.zeros(size, dtype=torch_dtype, pin_memory=True)
            self.host = self._source.numpy()
            self._device = torch.zeros(size, dtype=torch_dtype, device=device)

    def to_device(self, size: int) -> Tensor:
        """The first `size` elements as they are now, on the device."""
        part = self._device[:size]
        if self._device is not self._source:
            part.copy_(self._source[:size], non_blocking=True)
        return part


def _fill_token_ids(target: npt.NDArray[np.int64], plan: Plan) -> None:
    position = 0
    for sequence, count in zip(plan.sequences, plan.token_counts, strict=True):
        start = sequence.num_computed_tokens
        if count == 1:
            target[position] = sequence.token_ids[start]
        else:
            share: array[int] = sequence.token_ids[start : start + count]
            target[position : position + count] = np.frombuffer(share, np.int64)
        position += count
