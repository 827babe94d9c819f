"""Chooses the tokens of a step on the device that has their logits; the host does not wait.

A step is staged, enqueued and fetched; `launch` does all three:

    form = sampler.stage(batch)         # the numbers of the step: one transfer to the device
    sampler.enqueue(logits, form)       # kernels alone; a CUDA graph can hold them, see `choose`
    pending = sampler.fetch()           # one transfer back, behind the kernels
    ...                                 # the next step is launched on `pending.token_ids`
    tokens = pending.result()           # waits

Tokens are those of `sampler.sample`: one uniform number per row inverts the cumulative distribution
in the order of token ids. Gumbel noise (the likeliest of logits + noise) would save the sum over a
row where no filter is on, but takes a number per token: the same seed would mean other tokens than
on a CPU, and than in a step that filters.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from services.engine.core.device_counts import MOST_DISTINCT, DeviceCounts
from services.engine.core.device_edits import pack_edits
from services.engine.core.kernels.sampling import (
    Column,
    DeviceEdits,
    EditKind,
    Penalties,
    SamplingForm,
    SamplingWorkspace,
    choose_tokens,
    edit_logits,
    mask_logits,
    penalize,
    report_logprobs,
)
from services.engine.core.logit_edits import CountedRow, LogitEdits, TokenMasks
from services.engine.core.sampler import SampledTokens, SamplingBatch, sample
from services.engine.core.staged_step import StagedStep, fill_parameters, form_of, read_step

_IN_FLIGHT = 2


@dataclass(slots=True)
class _Slot:
    """The host's side of one step in flight: pinned memory that the device reads and writes."""

    parameters: Tensor  # [columns * max_rows] float64
    chosen: Tensor  # [2 * max_rows] int64
    pending: PendingTokens | None = None


class PendingTokens:
    """The tokens of a step that has been launched."""

    def __init__(
        self,
        token_ids: Tensor,
        read: Callable[[], SampledTokens],
        done: torch.cuda.Event | None = None,
    ) -> None:
        """read: what they are, to be called once the device is `done`."""
        self.token_ids = token_ids
        """[rows] int64 on the device. The stream that sampled them may read them at once, until the
        next step is enqueued on it. Rows that failed hold some token of the vocabulary."""
        self._read = read
        self._done = done
        self._tokens: SampledTokens | None = None

    def is_ready(self) -> bool:
        """Whether `result` would not wait."""
        if self._tokens is not None or self._done is None:
            return True
        return bool(self._done.query())  # type: ignore[no-untyped-call]

    def result(self) -> SampledTokens:
        """What `sampler.sample` gives; waits for the device the first time."""
        if self._tokens is None:
            if self._done is not None:
                self._done.synchronize()
            self._tokens = self._read()
        return self._tokens


class DeviceSampler:
    """Samples the steps of one engine, up to two of which are in flight; a third waits for the
    first.

    A batch with logits processors is sampled at once, by `sampler.sample`, and the host waits:
    processors are Python that reads logits. So is every batch on a CPU.
    """

    def __init__(
        self,
        device: torch.device,
        max_rows: int,
        vocab_size: int,
        *,
        at_once: bool | None = None,
    ) -> None:
        """max_rows: of logits in a step, with those of drafts and of scored prompts. at_once:
        whether every batch is sampled by `sampler.sample`; by default on a CPU."""
        self._device = device
        self._max_rows = max_rows
        self._vocab_size = vocab_size
        self._at_once = device.type == "cpu" if at_once is None else at_once
        self._steps = 0
        self._staged: StagedStep | None = None
        self._chosen = torch.zeros(2 * max_rows, dtype=torch.int64, device=device)
        if self._at_once:
            return
        self._counts = DeviceCounts(device)
        self._workspace = SamplingWorkspace.make(device, max_rows, vocab_size)
        numbers, choices = len(Column) * max_rows, 2 * max_rows
        self._parameters = torch.zeros(numbers, dtype=torch.float64, device=device)
        self._slots = [
            _Slot(self._pinned(numbers, torch.float64), self._pinned(choices, torch.int64))
            for _ in range(_IN_FLIGHT)
        ]

    @property
    def token_ids(self) -> Tensor:
        """[max_rows] int64, where the tokens of every step are chosen."""
        return self._chosen[: self._max_rows]

    def launch(self, logits: Tensor, batch: SamplingBatch) -> PendingTokens:
        """Sample `logits` ([rows, vocab] float32, edited in place) on the current stream."""
        if self._at_once or (batch.edits is not None and batch.edits.has_processors):
            tokens = sample(logits, batch)
            token_ids = self._chosen[: len(logits)]
            token_ids.copy_(torch.tensor(tokens.token_ids))
            return PendingTokens(token_ids, lambda: tokens)
        self.enqueue(logits, self.stage(batch))
        return self.fetch()

    def stage(self, batch: SamplingBatch, form: SamplingForm | None = None) -> SamplingForm:
        """Send what the step's kernels read; nothing at all where it is greedy.

        form: of the captured `choose` that is replayed instead of `enqueue`; see `captured_forms`.

        Precondition: the batch has no logits processors, and masks have been filled.
        """
        slot = self._slots[self._steps % _IN_FLIGHT]
        if slot.pending is not None:
            slot.pending.result()  # its memory is about to be written
            slot.pending = None
        form = form or form_of(batch, self._vocab_size)
        self._staged = staged = StagedStep(form, batch.logprobs)
        if not form.is_greedy:
            used = len(Column) * form.num_rows
            fill_parameters(slot.parameters[:used].view(len(Column), -1).numpy(), batch)
            self._parameters[:used].copy_(slot.parameters[:used], non_blocking=True)
        if batch.masks is not None:
            staged.masks = self._send_masks(batch.masks)
        if batch.edits is not None:
            counted = batch.edits.counted(MOST_DISTINCT)
            if counted:
                staged.penalties = self._send_penalties(counted, batch.edits.latest)
            self._send_edits(batch.edits, staged)
        return form

    def enqueue(self, logits: Tensor, form: SamplingForm) -> None:
        """Run the kernels of the staged step, whose form this is, on its `logits`."""
        assert self._staged is not None
        staged = self._staged
        if staged.masks is not None:
            mask_logits(logits, *staged.masks)
        raw = logits
        if form.most_logprobs >= 0 and (staged.edits is not None or staged.penalties is not None):
            raw = logits.clone()
        if staged.penalties is not None:
            penalize(logits, staged.penalties, self._counts.table)
            self._counts.note_sent()
        if staged.edits is not None:
            edit_logits(logits, staged.edits)
        self.choose(logits, form)
        if form.most_logprobs >= 0:
            parameters, chosen = self._memory_of(form)
            shape = (1 + 2 * form.most_logprobs, form.num_rows)
            staged.reports = torch.empty(shape, dtype=torch.float64, device=self._device)
            report_logprobs(raw, parameters, chosen[0], staged.reports, form, self._workspace)

    def captured_forms(self, num_rows: int) -> tuple[SamplingForm, ...]:
        """Forms in which `choose` is worth capturing: between them they sample all batches of up to
        so many rows that have neither masks nor edits and report no log-probabilities, the first of
        them all that are greedy."""
        if self._at_once:
            return ()
        return SamplingForm(num_rows), SamplingForm(num_rows, draws=True, filters=True)

    def choose(self, logits: Tensor, form: SamplingForm) -> None:
        """Choose the tokens of `logits` by what is staged. Captured, it may be replayed for what is
        staged in the same form: it reads and writes the same memory."""
        parameters, chosen = self._memory_of(form)
        choose_tokens(logits, parameters, chosen, form, self._workspace)

    def _memory_of(self, form: SamplingForm) -> tuple[Tensor, Tensor]:
        parameters = self._parameters[: len(Column) * form.num_rows]
        chosen = self._chosen[: 2 * form.num_rows]
        return parameters.view(len(Column), -1), chosen.view(2, -1)

    def fetch(self) -> PendingTokens:
        """Have the tokens of the enqueued step brought to the host."""
        assert self._staged is not None
        staged, self._staged = self._staged, None
        slot = self._slots[self._steps % _IN_FLIGHT]
        self._steps += 1
        used = 2 * staged.form.num_rows
        slot.chosen[:used].copy_(self._chosen[:used], non_blocking=True)
        reports = None
        if staged.reports is not None:
            reports = self._pinned(staged.reports.shape, torch.float64)
            reports.copy_(staged.reports, non_blocking=True)
        done = None
        if self._device.type == "cuda":
            done = torch.cuda.Event()  # type: ignore[no-untyped-call]
            done.record()
        slot.pending = PendingTokens(
            self._chosen[: staged.form.num_rows],
            partial(read_step, staged, slot.chosen[:used].view(2, -1), reports),
            done,
        )
        return slot.pending

    def _send_masks(self, masks: TokenMasks) -> tuple[Tensor, Tensor]:
        words = torch.from_numpy(masks.words.view(np.int32))
        if self._device.type == "cuda" and not words.is_pinned():
            words = words.pin_memory()
        rows = self._send(masks.rows.astype(np.int32))
        return rows, words.to(self._device, non_blocking=True)

    def _send_penalties(self, counted: list[CountedRow], latest: Tensor | None) -> Penalties:
        packed, begins = self._counts.pack(counted)
        numbers, rows, ends, changed = self._send(packed).tensor_split(begins)
        return Penalties(
            numbers.view(torch.float64).view(3, -1),
            rows.view(4, -1),
            ends,
            changed.view(3, -1),
            # Anything where nobody looks.
            self._chosen if latest is None else latest,
        )

    def _send_edits(self, edits: LogitEdits, staged: StagedStep) -> None:
        packed = pack_edits(edits, self._vocab_size, without_counted=MOST_DISTINCT)
        staged.unknown_rows = packed.unknown_rows
        if not len(packed.rows):
            return
        integers = np.concatenate(
            (packed.rows, packed.offsets.ravel(), packed.token_ids, packed.numbers.view(np.int32))
        )
        ends = np.cumsum((len(packed.rows), packed.offsets.size, len(packed.token_ids)))
        rows, offsets, token_ids, numbers = self._send(integers).tensor_split(ends.tolist())
        staged.edits = DeviceEdits(
            rows, offsets.view(len(EditKind), -1), token_ids, numbers.view(torch.float32)
        )

    def _send(self, array: npt.NDArray[np.int32]) -> Tensor:
        # Memory that torch's allocator pins is kept by it until the transfer is over.
        staging = self._pinned(array.shape, torch.int32)
        staging.numpy()[:] = array
        return staging.to(self._device, non_blocking=True)

    def _pinned(self, shape: int | tuple[int, ...], dtype: torch.dtype) -> Tensor:
        return torch.empty(shape, dtype=dtype, pin_memory=self._device.type == "cuda")
