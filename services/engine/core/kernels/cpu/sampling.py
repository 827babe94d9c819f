"""Sampling by the native kernel: one call for all rows of a step."""

from __future__ import annotations

import ctypes
import threading
from enum import IntEnum

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from services.engine.core.kernels.cpu.library import Library, active, check, why_not
from services.engine.core.logit_edits import LogitEdits
from services.engine.core.messages import TokenLogprobs
from services.engine.core.sampler import LogitsError, SampledTokens, SamplingBatch, sample

_ALIGNMENT_BYTES = 64


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
    )


class _Scratch(threading.local):
    """What the kernel works with, kept from one step to the next."""

    def __init__(self) -> None:
        self._memory = np.empty(0, np.uint8)

    def address(self, size_bytes: int) -> int:
        if self._memory.size < size_bytes + _ALIGNMENT_BYTES:
            self._memory = np.empty(size_bytes + _ALIGNMENT_BYTES, np.uint8)
        address = _address(self._memory)
        return address + -address % _ALIGNMENT_BYTES


_scratch = _Scratch()


@sample.implementation("cpu", name="native", unavailable=why_not)
def sample_natively(logits: Tensor, batch: SamplingBatch) -> SampledTokens:
    """`sampler.sample` in one native call; a row whose edits name an unknown token fails alone."""
    kernels = active()
    if kernels is None or logits.dtype != torch.float32 or logits.stride(-1) != 1:
        return sample.reference(logits, batch)
    return sample_with(kernels, logits, batch)


def sample_with(kernels: Library, logits: Tensor, batch: SamplingBatch) -> SampledTokens:
    """Sample `logits` ([rows, vocab] float32, each row contiguous) with the kernels given."""
    num_rows, vocab = logits.shape
    tokens = np.empty(num_rows, np.int64)
    statuses = np.empty(num_rows, np.int32)
    most = max(int(batch.logprobs.max(initial=-1)), -1)
    chosen_logprobs = np.empty(num_rows if most >= 0 else 0, np.float32)
    top_tokens = np.empty((num_rows, max(most, 0)), np.int64)
    top_logprobs = np.empty((num_rows, max(most, 0)), np.float32)
    args = SampleArgs(
        logits=logits.data_ptr(),
        stride=logits.stride(0),
        rows=num_rows,
        vocab=vocab,
        temperature=_address(batch.temperature),
        top_k=_address(batch.top_k),
        top_p=_address(batch.top_p),
        min_p=_address(batch.min_p),
        uniforms=_address(batch.uniforms),
        logprobs=_address(batch.logprobs) if most >= 0 else None,
        tokens=_address(tokens),
        statuses=_address(statuses),
        chosen_logprobs=_address(chosen_logprobs),
        most_logprobs=most,
        top_tokens=_address(top_tokens),
        top_logprobs=_address(top_logprobs),
    )
    kept = _add_edits(args, batch.edits, num_rows)
    reference = ctypes.byref(args)
    scratch = _scratch.address(kernels.table.sampling_scratch_bytes(reference))
    kernels.table.run_sampling(None, reference, scratch)
    del kept  # the edits' arrays, which had to outlive the call
    errors = [_error(status) for status in statuses.tolist()]
    logprobs: list[TokenLogprobs | None] = [None] * num_rows
    for row in np.flatnonzero(batch.logprobs >= 0).tolist() if most >= 0 else ():
        if errors[row] is None:
            count = min(int(batch.logprobs[row]), vocab)
            logprobs[row] = TokenLogprobs(
                float(chosen_logprobs[row]),
                top_tokens[row, :count].tolist(),
                top_logprobs[row, :count].tolist(),
            )
    return SampledTokens(tokens.tolist(), logprobs, errors)


def _add_edits(args: SampleArgs, edits: LogitEdits | None, num_rows: int) -> list[object]:
    """Point `args` at the edits of each kind; returns the arrays that must outlive the call."""
    kept: list[object] = []
    if edits is None:
        return kept
    for kind, numbers in edits.by_kind().items():
        offsets = np.searchsorted(numbers.rows, np.arange(num_rows + 1))
        kept += [offsets, numbers]
        setattr(
            args,
            kind,
            _TokenNumbers(
                _address(offsets), _address(numbers.token_ids), _address(numbers.numbers)
            ),
        )
    return kept


def _error(status: int) -> LogitsError | None:
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
