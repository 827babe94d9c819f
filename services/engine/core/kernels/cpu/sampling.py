"""Sampling by the native kernel: one call for all rows of a step."""

from __future__ import annotations

import ctypes
import threading
from enum import IntEnum

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from services.engine.core.errors import EngineError
from services.engine.core.kernels.cpu.library import Library, active, check, why_not
from services.engine.core.logit_edits import LogitEdits, ProcessedLogits, TokenMasks
from services.engine.core.messages import TokenLogprobs
from services.engine.core.sampler import LogitsError, SampledTokens, SamplingBatch, sample

_ALIGNMENT_BYTES = 64
_EDITS = ("repetition", "subtracted", "added", "allowed", "banned")


class SampleStatus(IntEnum):
    """`enum class SampleStatus` of src/sampling.h."""

    CHOSEN = 0
    NOT_FINITE = 1
    UNKNOWN_TOKEN = 2


class _TokenNumbers(ctypes.Structure):
    """`struct TokenNumbers` of src/sampling.h."""

    _fields_ = (
        ("offsets", ctypes.c_void_p),
        ("tokens", ctypes.c_void_p),
        ("numbers", ctypes.c_void_p),
    )


class _TokenMasks(ctypes.Structure):
    """`struct TokenMasks` of src/sampling.h."""

    _fields_ = (("of_rows", ctypes.c_void_p), ("words", ctypes.c_void_p))


class _ProcessedLogits(ctypes.Structure):
    """`struct ProcessedLogits` of src/sampling.h."""

    _fields_ = (("of_rows", ctypes.c_void_p), ("logits", ctypes.c_void_p))


class SampleArgs(ctypes.Structure):
    """`struct SampleArgs` of src/sampling.h, which describes it."""

    _fields_ = (
        ("logits", ctypes.c_void_p),
        ("stride", ctypes.c_int64),
        ("rows", ctypes.c_int32),
        ("vocab", ctypes.c_int32),
        ("temperature", ctypes.c_void_p),
        ("top_k", ctypes.c_void_p),
        ("top_p", ctypes.c_void_p),
        ("min_p", ctypes.c_void_p),
        ("uniforms", ctypes.c_void_p),
        ("logprobs", ctypes.c_void_p),
        ("given", ctypes.c_void_p),
        ("repetition", _TokenNumbers),
        ("subtracted", _TokenNumbers),
        ("added", _TokenNumbers),
        ("allowed", _TokenNumbers),
        ("banned", _TokenNumbers),
        ("tokens", ctypes.c_void_p),
        ("statuses", ctypes.c_void_p),
        ("chosen_logprobs", ctypes.c_void_p),
        ("most_logprobs", ctypes.c_int32),
        ("top_tokens", ctypes.c_void_p),
        ("top_logprobs", ctypes.c_void_p),
        ("masks", _TokenMasks),
        ("processed", _ProcessedLogits),
    )


class _Workspace(threading.local):
    """What a thread's calls need beside their input, kept from one step to the next."""

    def __init__(self) -> None:
        self._kernels: Library | None = None
        self._vocab = 0
        self._scratch = np.empty(0, np.uint8)
        self._tokens = np.empty(0, np.int64)
        self._statuses = np.empty(0, np.int32)
        self.args = SampleArgs()
        self.greedy_args = SampleArgs()  # nothing in them is ever on

    def point_to(self, args: SampleArgs, logits: Tensor) -> None:
        """Let `args` read `logits` and write where `read` looks."""
        num_rows, vocab = logits.shape
        args.logits, args.stride = logits.data_ptr(), logits.stride(0)
        args.rows, args.vocab = num_rows, vocab
        if num_rows > self._tokens.size:
            self._tokens = np.empty(num_rows, np.int64)
            self._statuses = np.empty(num_rows, np.int32)
            for each in (self.args, self.greedy_args):
                each.tokens, each.statuses = _address(self._tokens), _address(self._statuses)

    def run(self, kernels: Library, args: SampleArgs) -> None:
        """Sample all rows on this thread."""
        if kernels is not self._kernels or args.vocab != self._vocab:
            size_bytes = kernels.table.sampling_scratch_bytes(ctypes.byref(args))
            self._scratch = np.empty(size_bytes + _ALIGNMENT_BYTES, np.uint8)
            address = _address(self._scratch)
            self._aligned = address + -address % _ALIGNMENT_BYTES
            self._run = kernels.table.run_sampling
            self._kernels, self._vocab = kernels, args.vocab
        self._run(None, ctypes.byref(args), self._aligned)

    def read(self, num_rows: int) -> tuple[list[int], list[EngineError | None]]:
        """The token and the error of each row."""
        errors = list(map(_error, self._statuses[:num_rows].tolist()))
        return self._tokens[:num_rows].tolist(), errors


_workspace = _Workspace()


@sample.implementation("cpu", name="native", unavailable=why_not)
def sample_natively(logits: Tensor, batch: SamplingBatch) -> SampledTokens:
    """`sampler.sample` in one native call; a row whose edits name an unknown token fails alone."""
    kernels = active()
    if kernels is None or logits.dtype != torch.float32 or logits.stride(-1) != 1:
        return sample.reference(logits, batch)
    return sample_with(kernels, logits, batch)


def sample_with(kernels: Library, logits: Tensor, batch: SamplingBatch) -> SampledTokens:
    """Sample `logits` ([rows, vocab] float32, each row contiguous) with the kernels given."""
    request = SampleRequest(logits, batch)
    _workspace.run(kernels, request.args)
    return request.read()


class SampleRequest:
    """What a kernel is to choose from `logits` ([rows, vocab] float32, each row contiguous), which
    may be written until it runs, except where the batch has logits processors: they read them.

    A thread makes, runs and reads one after the other.
    """

    def __init__(self, logits: Tensor, batch: SamplingBatch) -> None:
        self._num_rows, self._vocab = logits.shape
        self._reports: _Reports | None = None
        self._processed: ProcessedLogits | None = None
        if batch.is_greedy:
            self.args = _workspace.greedy_args
        else:
            self.args = _workspace.args
            # The edits' arrays have to outlive the call.
            self._kept = _add_edits(self.args, batch.edits, self._num_rows)
            self._kept += _add_masks(self.args, batch.masks, self._num_rows)
            self._processed = _processed(batch, logits)
            self._kept += _add_processed(self.args, self._processed, self._num_rows)
            self._reports = _Reports(self.args, batch.logprobs)
            self.args.given = None if batch.given is None else _address(batch.given)
            _add_numbers(self.args, batch)
        _workspace.point_to(self.args, logits)

    def read(self) -> SampledTokens:
        """What the kernel has chosen."""
        tokens, errors = _workspace.read(self._num_rows)
        if self._reports is None:
            return SampledTokens(tokens, [None] * self._num_rows, errors)
        if self._processed is not None:
            for row, error in self._processed.errors.items():
                errors[row] = error
        return SampledTokens(tokens, self._reports.read(errors, self._vocab), errors)


def _add_numbers(args: SampleArgs, batch: SamplingBatch) -> None:
    if not batch.temperature.any():
        args.temperature = None
        return
    args.temperature = _address(batch.temperature)
    args.top_k, args.top_p = _address(batch.top_k), _address(batch.top_p)
    args.min_p, args.uniforms = _address(batch.min_p), _address(batch.uniforms)


class _Reports:
    """The log-probabilities that a step reports, and the arrays that the kernel writes them to."""

    def __init__(self, args: SampleArgs, counts: npt.NDArray[np.int64]) -> None:
        self._counts = counts
        self._rows = np.flatnonzero(counts >= 0).tolist() if counts.max(initial=-1) >= 0 else []
        if not self._rows:
            args.logprobs = None
            return
        most = int(counts.max())
        self._chosen = np.empty(len(counts), np.float32)
        self._top_tokens = np.empty((len(counts), most), np.int64)
        self._top_logprobs = np.empty((len(counts), most), np.float32)
        args.logprobs, args.most_logprobs = _address(counts), most
        args.chosen_logprobs = _address(self._chosen)
        args.top_tokens = _address(self._top_tokens)
        args.top_logprobs = _address(self._top_logprobs)

    def read(self, errors: list[EngineError | None], vocab: int) -> list[TokenLogprobs | None]:
        """What each row has to report, None for rows that failed or report nothing."""
        logprobs: list[TokenLogprobs | None] = [None] * len(self._counts)
        for row in self._rows:
            if errors[row] is None:
                top = self._top_logprobs[row, : min(int(self._counts[row]), vocab)]
                count = np.count_nonzero(top > -np.inf)
                logprobs[row] = TokenLogprobs(
                    float(self._chosen[row]),
                    self._top_tokens[row, :count].tolist(),
                    top[:count].tolist(),
                )
        return logprobs


def _add_edits(args: SampleArgs, edits: LogitEdits | None, num_rows: int) -> list[object]:
    """Point `args` at the edits of each kind; returns the arrays that must outlive the call."""
    kept: list[object] = []
    by_kind = {} if edits is None else edits.by_kind()
    for kind in _EDITS:
        numbers = by_kind.get(kind)
        if numbers is None:
            getattr(args, kind).offsets = None
            continue
        offsets = np.searchsorted(numbers.rows, np.arange(num_rows + 1))
        kept += [offsets, numbers]
        edit = _TokenNumbers(
            _address(offsets), _address(numbers.token_ids), _address(numbers.numbers)
        )
        setattr(args, kind, edit)
    return kept


def _add_masks(args: SampleArgs, masks: TokenMasks | None, num_rows: int) -> list[object]:
    """Point `args` at the masks; returns the arrays that must outlive the call."""
    if masks is None:
        args.masks.of_rows = None
        return []
    of_rows = np.full(num_rows, -1, np.int64)
    of_rows[masks.rows] = np.arange(len(masks.rows))
    args.masks = _TokenMasks(_address(of_rows), _address(masks.words))
    return [of_rows, masks]


def _processed(batch: SamplingBatch, logits: Tensor) -> ProcessedLogits | None:
    if batch.edits is None or not batch.edits.has_processors:
        return None
    if batch.masks is not None:
        batch.masks.apply(logits)
    return batch.edits.process(logits)


def _add_processed(
    args: SampleArgs, processed: ProcessedLogits | None, num_rows: int
) -> list[object]:
    """Point `args` at processed logits; returns the arrays that must outlive the call."""
    if processed is None:
        args.processed.of_rows = None
        return []
    of_rows = np.full(num_rows, -1, np.int64)
    of_rows[processed.rows] = np.arange(len(processed.rows))
    args.processed = _ProcessedLogits(_address(of_rows), processed.logits.data_ptr())
    return [of_rows, processed]


def _error(status: int) -> EngineError | None:
    if status == SampleStatus.CHOSEN:
        return None
    if status == SampleStatus.UNKNOWN_TOKEN:
        return LogitsError("a penalty, bias or bar names a token that the vocabulary does not have")
    return LogitsError(
        "the logits are not finite or leave no token to choose; nothing can be sampled from them"
    )


def _address(array: npt.NDArray[np.generic]) -> int:
    if not array.flags.c_contiguous:
        raise ValueError("the kernels read contiguous arrays alone")
    address: int = array.__array_interface__["data"][0]
    return address


@check("sampling")
def samples_correctly(kernels: Library) -> bool:
    """Whether a row of known logits gives the tokens that the definition gives."""
    logits = torch.arange(1000, dtype=torch.float32).remainder(97).div_(8).repeat(3, 1)
    batch = SamplingBatch(
        temperature=np.array([0.0, 0.7, 1.0], np.float32),
        top_k=np.array([0, 20, 0], np.int64),
        top_p=np.array([1.0, 1.0, 0.5], np.float32),
        min_p=np.zeros(3, np.float32),
        uniforms=np.array([0.0, 0.5, 0.99]),
        logprobs=np.full(3, -1, np.int64),
    )
    expected = sample.reference(logits.clone(), batch)
    return sample_with(kernels, logits, batch) == expected
