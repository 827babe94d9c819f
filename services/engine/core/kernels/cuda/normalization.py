"""Root-mean-square normalisation in CUDA C++ (src/rms_norm.cu)."""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from services.engine.core.kernels.cuda.library import FORMATS, beneath, call, is_aligned, why_not
from services.engine.core.kernels.normalization import add_rms_norm, rms_norm

# A row is kept in the registers of one block; for the short ones of heads a block is too much.
_SIZES = range(256, 16384 + 1, 8)


class RmsNormArgs(ctypes.Structure):
    """`struct RmsNormArgs`, field by field."""

    _fields_ = (
        ("hidden", ctypes.c_void_p),
        ("before", ctypes.c_void_p),
        ("residual", ctypes.c_void_p),
        ("weight", ctypes.c_void_p),
        ("output", ctypes.c_void_p),
        ("hidden_stride", ctypes.c_int64),
        ("rows", ctypes.c_int32),
        ("size", ctypes.c_int32),
        ("eps", ctypes.c_float),
        ("format", ctypes.c_int32),
    )


@rms_norm.implementation("cuda", name="cuda", unavailable=why_not)
def rms_norm_cuda(hidden: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Normalise rows: see the op."""
    if not _serves(hidden, weight):
        normalised: Tensor = beneath(rms_norm)(hidden, weight, eps)
        return normalised
    return _launch(hidden, None, weight, eps, None)


@add_rms_norm.implementation("cuda", name="cuda", unavailable=why_not)
def add_rms_norm_cuda(
    hidden: Tensor, residual: Tensor, weight: Tensor, eps: float, before: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Add to the residual stream, in place, and normalise the sum: see the op."""
    is_served = (
        _serves(hidden, weight)
        and (before is None or _serves(hidden, before))
        and residual.is_contiguous()
        and is_aligned(residual)
    )
    if not is_served:
        below = beneath(add_rms_norm)
        both: tuple[Tensor, Tensor] = below(hidden, residual, weight, eps, before)
        return both
    return _launch(hidden, residual, weight, eps, before), residual


def _serves(hidden: Tensor, weight: Tensor) -> bool:
    size = hidden.shape[-1]
    return (
        hidden.dtype in (torch.bfloat16, torch.float16)
        and weight.dtype == hidden.dtype
        and hidden.dim() == 2
        and size in _SIZES
        and is_aligned(hidden, weight)
    )


def _launch(
    hidden: Tensor, residual: Tensor | None, weight: Tensor, eps: float, before: Tensor | None
) -> Tensor:
    output = torch.empty(hidden.shape, dtype=hidden.dtype, device=hidden.device)
    if hidden.shape[0] == 0:
        return output
    arguments = RmsNormArgs(
        hidden.data_ptr(),
        None if before is None else before.data_ptr(),
        None if residual is None else residual.data_ptr(),
        weight.data_ptr(),
        output.data_ptr(),
        hidden.stride(0),
        hidden.shape[0],
        hidden.shape[1],
        eps,
        FORMATS[hidden.dtype],
    )
    call("rms_norm", arguments, hidden)
    return output
