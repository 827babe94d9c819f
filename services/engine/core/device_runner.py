"""Runs plans on a device that computes while the host goes on.

A step is launched: its input is sent, the model and the choice of tokens are enqueued, and nothing
waits. The next may be launched behind it before its tokens are known, since the device knows them.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from services.engine.core.batch import CapturedShape
from services.engine.core.beside import Work
from services.engine.core.capturing import (
    DRAFTING_LIMITS,
    CaptureLimits,
    capture_all,
    capture_choices,
    shapes_for_drafting,
    shapes_to_capture,
)
from services.engine.core.clock import now_ns
from services.engine.core.constraints.masks import MaskCounts
from services.engine.core.device_counts import MOST_DISTINCT
from services.engine.core.device_inputs import DeviceInputs
from services.engine.core.device_sampling import DeviceSampler, PendingTokens
from services.engine.core.errors import EngineError
from services.engine.core.graphs import CapturingModel, CudaRecorder, GraphedModel
from services.engine.core.kernels.sampling import SamplingForm
from services.engine.core.plan import Plan, StepOutputs
from services.engine.core.preparation import (
    LatestTokens,
    Preparation,
    prepare_input,
    with_sampling,
)
from services.engine.core.runner import Model, step_outputs
from services.engine.core.sequence_rows import SequenceRows
from services.engine.core.speculation.controller import MAX_DRAFT_TOKENS

# The kernels for few queries take 16 of a sequence: all but the longest draft.
_FEW_QUERIES = MAX_DRAFT_TOKENS


@dataclass(slots=True, eq=False)
class LaunchedStep:
    """A step that the device computes, or has computed.

    Attributes:
        step: what it computes.
        logits: of the rows whose tokens are chosen later; None: they are being chosen.
        tokens: the choice; None: it is to come, or there is none.
        errors: of sequences whose rules cannot be followed, by their index in the plan.
    """

    step: Preparation
    launched_ns: int
    logits: Tensor | None = None
    tokens: PendingTokens | None = None
    errors: dict[int, EngineError] | None = None

    @property
    def plan(self) -> Plan:
        """The plan that it carries out."""
        return self.step.plan


class DeviceRunner:
    """Turns plans into outputs on a device, one after the other or overlapping."""

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
        vocab_size: int,
        num_groups: int = 1,
        takes_adapters: bool = False,
        captured_shapes: tuple[CapturedShape, ...] = (),
    ) -> None:
        """As Runner. captured_shapes: those that steps are padded to, if `capture` gets to them."""
        self.mask_counts = MaskCounts()
        self._model = model
        self._kv_cache = kv_cache
        self._takes_adapters = takes_adapters
        self._block_size = block_size
        self._candidates = captured_shapes
        self._shapes = _in_order(captured_shapes)
        self._rows = SequenceRows(
            max_running_sequences,
            -(-max_context_tokens // block_size),
            num_groups,
            notes_changes=True,
        )
        self._sampler = DeviceSampler(device, max_batch_tokens, vocab_size)
        self._inputs = DeviceInputs(
            self._rows,
            self._sampler.token_ids,
            device=device,
            block_size=block_size,
            padding_block=kv_cache.num_blocks,
            max_batch_tokens=max_batch_tokens,
            max_running_sequences=max_running_sequences,
            max_captured_tokens=max(
                (each.num_tokens for each in captured_shapes if each.max_query_length), default=0
            ),
            max_context_tokens=max_context_tokens,
        )
        # By captured shape, the forms in which its graphs choose tokens, too.
        self._choices: dict[CapturedShape, tuple[SamplingForm, ...]] = {}
        self._ended_ns = 0

    def capture(self, limits: CaptureLimits) -> None:
        """Have the model capture the shapes that steps are padded to; who is left out of them is
        not any more. To be called before the first step."""
        model, cache, inputs = self._model, self._kv_cache, self._inputs
        assert isinstance(model, CapturingModel)
        began_s = time.monotonic()
        done = capture_all(model, cache, self._candidates, inputs.padding, limits)
        self._shapes = _in_order(done)
        if not isinstance(model, GraphedModel):
            return  # of several ranks, whose graphs have parts of the logits
        left = replace(limits, seconds=limits.seconds - (time.monotonic() - began_s))
        within = inputs.padding_within
        self._choices = capture_choices(model, cache, done, within, left, self._sampler)

    def prepare(self, plan: Plan) -> None:
        """Nothing is prepared beforehand: steps are launched instead."""

    def run(self, plan: Plan, meanwhile: Work | None = None) -> StepOutputs:
        """Compute a plan and wait for it, as `Runner.run`."""
        launched = self.launch(plan, None)
        if meanwhile is not None:
            meanwhile()
        self.choose(launched)
        return self.finish(launched)

    def launch(self, plan: Plan, behind: LaunchedStep | None) -> LaunchedStep:
        """Tell the device to compute a plan, behind a step whose outputs are not there yet.

        Where the host has a part in the choice of tokens that hangs on those of that step, which
        the device alone knows, it is left for `choose`.
        """
        step = prepare_input(plan, self._rows, self._block_size)
        latest = None if behind is None else _latest(step, behind)
        with torch.inference_mode():
            if plan.block_copies:
                self._kv_cache.copy_blocks(plan.block_copies)
            adapters = self._adapters(plan)
            captured = self._captured(step, has_adapters=adapters is not None)
            form = self._captured_choice(step, captured)
            if captured is not None and form is not None:
                return self._replay(step, latest, captured, adapters, form)
            batch = self._inputs.batch(step, _token_ids(step), latest, captured, adapters)
            launched_ns = now_ns()
            logits = self._model(batch, self._kv_cache)
        launched = LaunchedStep(step, launched_ns, logits[: len(step.logits_rows)])
        if latest is None or not self._waits_for_tokens(step):
            self.choose(launched, latest)
        return launched

    def _replay(
        self,
        step: Preparation,
        latest: LatestTokens | None,
        captured: CapturedShape,
        adapters: tuple[int, ...] | None,
        form: SamplingForm,
    ) -> LaunchedStep:
        """Launch a step that is a transfer to the device, a graph, and a transfer back; another one
        where tokens are drawn, of their parameters."""
        with_sampling(step, self._rows)
        assert step.sampling is not None
        assert isinstance(self._model, GraphedModel)
        self._sampler.stage(step.sampling, form)
        batch = self._inputs.batch_within(step, _token_ids(step), latest, captured, adapters)
        launched_ns = now_ns()
        self._model(batch, self._kv_cache, form)
        return LaunchedStep(step, launched_ns, tokens=self._sampler.fetch())

    def choose(self, launched: LaunchedStep, latest: LatestTokens | None = None) -> None:
        """Tell the device to choose the tokens of a launched step, unless it has been told.

        Precondition: the outputs of all steps before it have been taken in but for `latest`.
        """
        if launched.logits is None:
            return
        logits, launched.logits = launched.logits, None
        launched.step = step = with_sampling(launched.step, self._rows, latest)
        if step.sampling is None:
            return
        if step.masks is not None:
            launched.errors = step.masks.fill(self.mask_counts)
        with torch.inference_mode():
            launched.tokens = self._sampler.launch(logits, step.sampling)

    def finish(self, launched: LaunchedStep) -> StepOutputs:
        """Wait for a launched step and return what it brought. Steps are finished in the order of
        their launches."""
        tokens = None if launched.tokens is None else launched.tokens.result()
        outputs = step_outputs(launched.step, tokens, launched.errors or {})
        # It began when the device was through with the step before.
        started_ns = max(launched.launched_ns, self._ended_ns)
        self._ended_ns = now_ns()
        return StepOutputs(launched.plan, outputs, started_ns, self._ended_ns)

    def _waits_for_tokens(self, step: Preparation) -> bool:
        """Whether a row of a step is edited by the host, by tokens that are to come.

        The device itself counts what it has just chosen, biases and bars hang on no token, and how
        many there will be is known.
        """
        for index in step.sampled:
            sequence = step.plan.sequences[index]
            if not self._rows.has_edits[sequence.row] or not sequence.num_pending_tokens:
                continue
            counts = self._rows.token_counts(sequence)
            if self._rows.reads_text[sequence.row] or (
                counts is not None and counts.num_distinct > MOST_DISTINCT
            ):
                return True
        return False

    def _captured_choice(
        self, step: Preparation, captured: CapturedShape | None
    ) -> SamplingForm | None:
        """The form in which the graph of a step chooses its tokens, too; None: none does."""
        forms = None if captured is None else self._choices.get(captured)
        if forms is None or not step.sampled or step.scores:
            return None
        rows = step.rows[step.sampled].tolist()
        if not all(self._rows.is_plain[row] for row in rows):
            return None
        return forms[0] if all(self._rows.is_greedy[row] for row in rows) else forms[1]

    def _captured(self, step: Preparation, *, has_adapters: bool) -> CapturedShape | None:
        counts = step.plan.token_counts
        longest, total = max(counts), sum(counts)
        for shape in self._shapes:
            fits = shape.max_query_length is None or longest <= shape.max_query_length
            if fits and total <= shape.num_tokens and shape.has_adapters == has_adapters:
                return shape
        return None

    def _adapters(self, plan: Plan) -> tuple[int, ...] | None:
        if not self._takes_adapters:
            return None
        slots = tuple(-1 if each.adapter is None else each.adapter.slot for each in plan.sequences)
        return slots if max(slots) >= 0 else None


def make_device_runner(
    model: Any,
    kv_cache: Any,
    *,
    captures: bool,
    drafts: bool,
    graphed: Callable[..., CapturingModel] = GraphedModel,
    **shape: Any,
) -> DeviceRunner:
    """A runner on a CUDA device, with the graphs that are worth it.

    captures: whether there are to be any. drafts: whether steps verify guesses. graphed: makes a
    model one with graphs, taking what GraphedModel does. shape: what DeviceRunner takes.
    """
    if not captures:
        return DeviceRunner(model, kv_cache, **shape)
    shapes = shapes_to_capture(
        max_running_sequences=shape["max_running_sequences"],
        max_batch_tokens=shape["max_batch_tokens"],
        max_query_length=_FEW_QUERIES if drafts else 1,
        takes_adapters=shape["takes_adapters"],
    )
    return _capturing_runner(model, kv_cache, shapes, CaptureLimits(), graphed, **shape)


def make_drafting_runner(
    model: Any, kv_cache: Any, *, captures: bool, **shape: Any
) -> DeviceRunner:
    """The same for a draft model, whose graphs are few."""
    if not captures:
        return DeviceRunner(model, kv_cache, **shape)
    shapes = shapes_for_drafting(
        max_running_sequences=shape["max_running_sequences"],
        max_batch_tokens=shape["max_batch_tokens"],
        max_query_length=_FEW_QUERIES,
    )
    return _capturing_runner(model, kv_cache, shapes, DRAFTING_LIMITS, GraphedModel, **shape)


def _capturing_runner(
    model: Any,
    kv_cache: Any,
    shapes: tuple[CapturedShape, ...],
    limits: CaptureLimits,
    graphed: Callable[..., CapturingModel],
    **shape: Any,
) -> DeviceRunner:
    device = shape["device"]
    capturing = graphed(model, CudaRecorder(device), shapes, device=device)
    runner = DeviceRunner(capturing, kv_cache, captured_shapes=shapes, **shape)
    runner.capture(limits)
    return runner


def _in_order(shapes: tuple[CapturedShape, ...]) -> list[CapturedShape]:
    """Those first that take the least; those in pieces last."""
    return sorted(
        shapes,
        key=lambda each: (each.max_query_length is None, each.max_query_length, each.num_tokens),
    )


def _latest(step: Preparation, behind: LaunchedStep) -> LatestTokens | None:
    """The tokens of `step` that the step before it brings."""
    rows: list[tuple[int, int]] = []
    row_of = behind.step.sampled_row_of
    place = -1
    for sequence, count in zip(step.plan.sequences, step.plan.token_counts, strict=True):
        place += count
        if sequence.num_pending_tokens:
            rows.append((place, row_of[sequence]))
    if not rows:
        return None
    assert behind.tokens is not None, "a step is launched behind one whose tokens are being chosen"
    return LatestTokens(behind.tokens.token_ids, row_of, rows)


def _token_ids(step: Preparation) -> npt.NDArray[np.int64]:
    """All tokens of a step that the host knows, in their places."""
    ids = np.zeros(len(step.positions), np.int64)
    begin = 0
    plan = step.plan
    for index, (sequence, count) in enumerate(zip(plan.sequences, plan.token_counts, strict=True)):
        start = sequence.num_computed_tokens + sequence.num_launched_tokens
        known = sequence.token_ids[start : start + count]
        end = begin + len(known)
        ids[begin:end] = known
        if step.drafts is not None:
            ids[end : begin + count] = step.drafts[index]
        begin += count
    return ids
