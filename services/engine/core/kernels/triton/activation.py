"""Activations of feed-forward layers in Triton: one pass, 16 bytes at a time."""

from __future__ import annotations

import torch
from torch import Tensor
from triton import cdiv, jit
from triton import language as tl

from services.engine.core.kernels.activation import gelu_tanh, gelu_tanh_and_mul, silu_and_mul
from services.engine.core.kernels.triton import why_not
from services.engine.core.kernels.triton.language import (
    gated,
    gelu,
    rounded,
    silu,
    wait_for_earlier,
)
from services.engine.core.kernels.triton.serving import FLOATS, begins_early, early_forms
from services.engine.core.kernels.triton.specialisation import Specialisation

# Eight elements of each of 128 threads. A row of 14336, as large models have it, is 14 programs: a
# step of one token is done by some multiprocessors at once, and of ten fills the card.
_TILE = 1024


@jit
def activation_kernel(  # type: ignore[no-untyped-def]
    hidden,
    output,
    row_stride,
    size: tl.constexpr,
    is_silu: tl.constexpr,
    is_gated: tl.constexpr,
    tile: tl.constexpr,
    is_early: tl.constexpr,
):
    """The activation of [rows, size]; gated, times what lies `size` columns further on."""
    wait_for_earlier(is_early)
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * tile + tl.arange(0, tile)
    inside = column < size
    begin = hidden + row * row_stride
    if is_gated:
        values = gated(begin + column, begin + size + column, inside, is_silu)
    else:
        values = tl.load(begin + column, inside, other=0.0).to(tl.float32)
        values = rounded(silu(values) if is_silu else gelu(values), output.dtype.element_ty)
    tl.store(output + row * size + column, values, inside)


def _activated(hidden: Tensor, *, is_silu: bool, is_gated: bool) -> Tensor:
    rows, width = hidden.shape
    size = width // 2 if is_gated else width
    output = torch.empty((rows, size), dtype=hidden.dtype, device=hidden.device)
    if rows:
        activation_kernel[(rows, cdiv(size, _TILE))](
            hidden,
            output,
            hidden.stride(0),
            size=size,
            is_silu=is_silu,
            is_gated=is_gated,
            tile=_TILE,
            num_warps=4,
            **begins_early(hidden.device),
        )
    return output


def _is_served(hidden: Tensor) -> bool:
    return hidden.dim() == 2 and hidden.dtype in FLOATS and hidden.stride(1) == 1


@silu_and_mul.implementation("cuda", name="triton", unavailable=why_not)
def silu_and_mul_triton(gate_up: Tensor) -> Tensor:
    """gate_up: [num_tokens, 2 * intermediate], with any stride between rows."""
    if not _is_served(gate_up):
        return silu_and_mul.reference(gate_up)
    return _activated(gate_up, is_silu=True, is_gated=True)


@gelu_tanh_and_mul.implementation("cuda", name="triton", unavailable=why_not)
def gelu_tanh_and_mul_triton(gate_up: Tensor) -> Tensor:
    """gate_up: [num_tokens, 2 * intermediate], with any stride between rows."""
    if not _is_served(gate_up):
        return gelu_tanh_and_mul.reference(gate_up)
    return _activated(gate_up, is_silu=False, is_gated=True)


@gelu_tanh.implementation("cuda", name="triton", unavailable=why_not)
def gelu_tanh_triton(hidden: Tensor) -> Tensor:
    """hidden: [num_tokens, intermediate], with any stride between rows."""
    if not _is_served(hidden):
        return gelu_tanh.reference(hidden)
    return _activated(hidden, is_silu=False, is_gated=False)


COMPILED = early_forms(
    Specialisation(
        activation_kernel,
        {"hidden": kind, "output": kind, "row_stride": "i32:16"},
        {"size": size, "is_silu": is_silu, "is_gated": is_gated, "tile": _TILE},
    )
    for kind, size in (("*bf16", 14336), ("*fp16", 11008), ("*fp32", 8960))
    for is_silu, is_gated in ((True, True), (False, True), (False, False))
)
