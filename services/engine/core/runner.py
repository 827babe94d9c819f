"""Runs one plan: builds the flattened batch, calls the model, samples, verifies drafts."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, Protocol, TypeAlias

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from services.engine.core.batch import ForwardBatch
from services.engine.core.beside import Helper, Work
from services.engine.core.clock import now_ns
from services.engine.core.constraints.masks import MaskCounts, StepMasks
from services.engine.core.errors import EngineError
from services.engine.core.messages import TokenLogprobs
from services.engine.core.plan import Plan, SequenceOutput, StepOutputs
from services.engine.core.preparation import Preparation, prepare
from services.engine.core.sampler import SampledTokens, SamplingBatch, sample
from services.engine.core.sequence_rows import SequenceRows
from services.engine.core.speculation.verification import verify
from services.engine.core.staging import Staging


class Model(Protocol):
    """Computes steps.

    One that can also choose tokens where it computes their logits has a method `sample(batch,
    kv_cache, sampling) -> SampledTokens`, which does what `sampler.sample` does with the logits.
    """

    def __call__(self, batch: ForwardBatch, kv_cache: Any, /) -> Tensor:
        """The logits of `batch.logits_rows`, [num_rows, vocab] float32."""
        ...


class PlanRunner(Protocol):
    """Turns plans into outputs."""

    mask_counts: MaskCounts

    def prepare(self, plan: Plan) -> None:
        """Prepare a plan of decodes that is likely to follow the one being computed."""

    def run(self, plan: Plan, meanwhile: Work | None = None) -> StepOutputs:
        """Compute a plan, and do `meanwhile` beside it."""


_Choose: TypeAlias = Callable[[ForwardBatch, Any, SamplingBatch], SampledTokens]

_NO_OUTPUT = SequenceOutput()
_NO_TOKENS = SampledTokens([], [], [])


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
        num_groups: int = 1,
        takes_adapters: bool = False,
    ) -> None:
        """num_groups: of layers, as the KV cache has them. takes_adapters: whether sequences go
        through their adapters; else the model is as it is for all of them."""
        self.mask_counts = MaskCounts()
        self._model = model
        self._kv_cache = kv_cache
        self._takes_adapters = takes_adapters
        self._block_size = block_size
        max_blocks = -(-max_context_tokens // block_size)
        self._rows = SequenceRows(max_running_sequences, max_blocks, num_groups)
        # Token ids, positions, slots and logits rows, packed one after the other.
        self._integers = Staging((3 + num_groups) * max_batch_tokens, np.int64, device)
        self._tables = Staging(num_groups * max_running_sequences * max_blocks, np.int32, device)
        self._computes_here = device.type == "cpu"
        self._helper: Helper | None = None
        self._prepared: Preparation | None = None

    def prepare(self, plan: Plan) -> None:
        """Prepare a plan of decodes that is likely to follow the one being computed.

        Each of its sequences will have one more token by then. Where logits are edited by what was
        said before, there is nothing to be done without that token.
        """
        if not any(self._rows.has_edits[sequence.row] for sequence in plan.sequences):
            self._prepared = prepare(plan, self._rows, self._block_size, num_pending_tokens=1)

    def run(self, plan: Plan, meanwhile: Work | None = None) -> StepOutputs:
        """Compute the planned tokens and sample from every sequence whose last token is computed.

        The K and V of the planned tokens are in the cache afterwards. Running the same plan again
        is harmless: it writes the same values to the same slots.

        `meanwhile` is done while the device computes; it may `prepare` what comes next. Where it is
        given, masks are filled meanwhile too.
        """
        started_ns = now_ns()
        step, self._prepared = self._prepared, None
        if step is None or step.plan is not plan:
            step = prepare(plan, self._rows, self._block_size)
        with torch.inference_mode():
            if plan.block_copies:
                self._kv_cache.copy_blocks(plan.block_copies)
            batch = self._batch(step)
            errors: dict[int, EngineError] = {}
            if step.masks is not None and meanwhile is None:
                errors = step.masks.fill(self.mask_counts)
            elif step.masks is not None and meanwhile is not None:
                meanwhile = partial(_fill_first, step.masks, self.mask_counts, errors, meanwhile)
            if meanwhile is None:
                tokens = self._compute(batch, step.sampling)
            elif self._computes_here:
                self._helper = self._helper or Helper()
                with self._helper.doing(meanwhile):
                    if step.masks is None:
                        tokens = self._compute(batch, step.sampling)
                    else:
                        logits = self._model(batch, self._kv_cache)
                if step.masks is not None and step.sampling is not None:
                    tokens = sample(logits, step.sampling)
            else:
                tokens = self._compute(batch, step.sampling, meanwhile)
        return StepOutputs(plan, step_outputs(step, tokens, errors), started_ns, now_ns())

    def _compute(
        self, batch: ForwardBatch, sampling: SamplingBatch | None, meanwhile: Work | None = None
    ) -> SampledTokens:
        if sampling is not None and meanwhile is None:
            choose: _Choose | None = getattr(self._model, "sample", None)
            if choose is not None:
                return choose(batch, self._kv_cache, sampling)
        logits = self._model(batch, self._kv_cache)
        if meanwhile is not None:
            meanwhile()  # the device has been told what to do, and is at it
        return _NO_TOKENS if sampling is None else sample(logits, sampling)

    def _batch(self, step: Preparation) -> ForwardBatch:
        total = len(step.positions)
        token_ids, positions, slots, logits_rows = self._integers.cut(
            (total,), (total,), step.slots.shape, (len(step.logits_rows),)
        )
        _fill_token_ids(token_ids, step.plan, step.drafts)
        positions[:] = step.positions
        slots[:] = step.slots
        logits_rows[:] = step.logits_rows
        (block_tables,) = self._tables.cut(step.block_tables.shape)
        block_tables[:] = step.block_tables
        token_ids_there, positions_there, slots_there, rows_there = self._integers.to_device()
        (tables_there,) = self._tables.to_device()
        return ForwardBatch(
            token_ids=token_ids_there,
            positions=positions_there,
            slots=slots_there,
            block_tables=tables_there,
            query_lengths=step.plan.token_counts,
            context_lengths=step.context_lengths,
            logits_rows=rows_there,
            adapters=self._adapters(step.plan),
        )

    def _adapters(self, plan: Plan) -> tuple[int, ...] | None:
        if not self._takes_adapters:
            return None
        slots = tuple(-1 if each.adapter is None else each.adapter.slot for each in plan.sequences)
        return slots if max(slots) >= 0 else None


def _fill_first(
    masks: StepMasks, counts: MaskCounts, errors: dict[int, EngineError], work: Work
) -> None:
    errors.update(masks.fill(counts))
    work()


def step_outputs(
    step: Preparation, tokens: SampledTokens | None, errors: dict[int, EngineError]
) -> tuple[SequenceOutput, ...]:
    """What a step brought each of its sequences: tokens, where any were chosen, or its own error,
    by its index."""
    outputs = _outputs(step, _NO_TOKENS if tokens is None else tokens)
    if not errors:
        return outputs
    return tuple(
        SequenceOutput(error=errors[index]) if index in errors else output
        for index, output in enumerate(outputs)
    )


def _outputs(step: Preparation, tokens: SampledTokens) -> tuple[SequenceOutput, ...]:
    if step.scores:
        return _scored_outputs(step, tokens)
    outputs = [_NO_OUTPUT] * len(step.plan.sequences)
    drafts = step.drafts
    row = 0
    for index in step.sampled:
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


def _scored_outputs(step: Preparation, tokens: SampledTokens) -> tuple[SequenceOutput, ...]:
    outputs = []
    row = 0
    sampled = frozenset(step.sampled)
    for index, positions in enumerate(step.scores):
        end = row + len(positions)
        scored = tuple(entry for entry in tokens.logprobs[row:end] if entry is not None)
        chosen: tuple[int, ...] = ()
        logprobs: tuple[TokenLogprobs, ...] = ()
        last = end + (index in sampled)
        error = next((each for each in tokens.errors[row:last] if each is not None), None)
        if error is None and last > end:
            chosen = tuple(tokens.token_ids[end:last])
            logprobs = tuple(entry for entry in tokens.logprobs[end:last] if entry is not None)
        outputs.append(SequenceOutput(chosen, logprobs, error, prompt_logprobs=scored))
        row = last
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
