"""Norms in Triton: a program has whole rows in registers, which are read and written once.

A norm is bound by memory: an H100 moves a row of 4096 bfloat16 in and out in 5 ns, and what a step
of few rows takes is the latency of one load, two reductions and one store. So a row is spread over
many threads, 16 elements each, which are two loads of 16 bytes that are under way together; short
rows, of heads, share a program.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from triton import cdiv, jit, next_power_of_2
from triton import language as tl

from services.engine.core.kernels.normalization import (
    add_rms_norm,
    layer_norm,
    rms_norm,
    rms_norm_of_rows,
)
from services.engine.core.kernels.quantized_rows import (
    LARGEST,
    add_rms_norm_quantized,
    quantize_rows,
)
from services.engine.core.kernels.triton import why_not
from services.engine.core.kernels.triton.language import (
    keep_rounded,
    rounded,
    wait_for_earlier,
)
from services.engine.core.kernels.triton.serving import (
    FLOATS,
    as_bytes,
    begins_early,
    converts_fp8,
    early_forms,
)
from services.engine.core.kernels.triton.specialisation import Specialisation

# Longer rows do not fit into the registers of a program.
LONGEST_ROW = 32768
_TILE_ELEMENTS = 1024
_THREAD_ELEMENTS = 16


@jit
def _normed(values, weight, eps, column, size: tl.constexpr):  # type: ignore[no-untyped-def]
    mean_square = tl.sum(values * values, 1, keep_dims=True) / size
    gains = tl.load(weight + column, column < size, other=0.0).to(tl.float32)
    return values * tl.rsqrt(mean_square + eps) * gains


@jit(do_not_specialize=["rows"])
def rms_norm_kernel(  # type: ignore[no-untyped-def]
    hidden,
    chosen,
    before,
    residual,
    weight,
    output,
    scales,
    rows,
    heads,
    token_stride,
    head_stride,
    residual_stride,
    eps,
    largest: tl.constexpr,
    to_fp8: tl.constexpr,
    size: tl.constexpr,
    tile_rows: tl.constexpr,
    tile_size: tl.constexpr,
    is_early: tl.constexpr,
):
    """RMSNorm of rows, which are `heads` of each token, and what comes before and after it: with
    `before`, a norm by that weight; with `residual`, which has one row a token, the sum that is
    normalised and kept there; with `chosen`, of the rows that it names alone, whose sums are not
    kept; with `scales`, rounding to the format whose largest element is `largest`; without
    `weight`, only that."""
    wait_for_earlier(is_early)
    row = tl.program_id(0).to(tl.int64) * tile_rows + tl.arange(0, tile_rows)[:, None]
    column = tl.arange(0, tile_size)[None, :]
    inside = (row < rows) & (column < size)
    source = row
    if chosen is not None:
        source = tl.load(chosen + row, row < rows, other=0)
    begin = source // heads * token_stride + source % heads * head_stride
    values = tl.load(hidden + begin + column, inside, other=0.0).to(tl.float32)
    if before is not None:
        values = _normed(values, before, eps, column, size)
        values = rounded(values, hidden.dtype.element_ty).to(tl.float32)
    if residual is not None:
        there = residual + source * residual_stride + column
        total = values + tl.load(there, inside, other=0.0).to(tl.float32)
        total = rounded(total, residual.dtype.element_ty)
        if chosen is None:
            tl.store(there, total, inside)
        values = total.to(tl.float32)
    if weight is not None:
        values = _normed(values, weight, eps, column, size)
    if scales is not None:
        if weight is not None:
            # As it would have been stored and read again.
            values = rounded(values, hidden.dtype.element_ty).to(tl.float32)
        scale = tl.max(tl.abs(values), 1, keep_dims=True) / largest
        tl.store(scales + row, scale, row < rows)
        keep_rounded(output + row * size + column, values, scale, inside, to_fp8)
    else:
        kept = rounded(values, output.dtype.element_ty)
        tl.store(output + row * size + column, kept, inside)


@jit(do_not_specialize=["rows"])
def layer_norm_kernel(  # type: ignore[no-untyped-def]
    hidden,
    weight,
    bias,
    output,
    rows,
    token_stride,
    eps,
    size: tl.constexpr,
    tile_rows: tl.constexpr,
    tile_size: tl.constexpr,
    is_early: tl.constexpr,
):
    """LayerNorm of [rows, size]."""
    wait_for_earlier(is_early)
    row = tl.program_id(0).to(tl.int64) * tile_rows + tl.arange(0, tile_rows)[:, None]
    column = tl.arange(0, tile_size)[None, :]
    inside = (row < rows) & (column < size)
    values = tl.load(hidden + row * token_stride + column, inside, other=0.0).to(tl.float32)
    centred = tl.where(inside, values - tl.sum(values, 1, keep_dims=True) / size, 0.0)
    variance = tl.sum(centred * centred, 1, keep_dims=True) / size
    gains = tl.load(weight + column, column < size, other=0.0).to(tl.float32)
    shifts = tl.load(bias + column, column < size, other=0.0).to(tl.float32)
    values = centred * tl.rsqrt(variance + eps) * gains + shifts
    tl.store(output + row * size + column, rounded(values, output.dtype.element_ty), inside)


def tile(size: int) -> tuple[int, int, int]:
    """Rows and columns of a program's tile, and its warps."""
    columns = next_power_of_2(size)
    rows = max(1, _TILE_ELEMENTS // columns)
    warps = rows * columns // (32 * _THREAD_ELEMENTS)
    return rows, columns, min(max(warps, 1), 16 if columns <= 16384 else 32)


def _are_rows(hidden: Tensor, *others: Tensor | None) -> bool:
    size = hidden.shape[-1]
    return size <= LONGEST_ROW and all(
        each.dtype in FLOATS and each.stride(-1) == 1 and each.shape[-1] == size
        for each in (hidden, *others)
        if each is not None
    )


def _launch(
    hidden: Tensor,
    residual: Tensor | None,
    weight: Tensor | None,
    eps: float,
    output: Tensor,
    scales: Tensor | None = None,
    before: Tensor | None = None,
    chosen: Tensor | None = None,
) -> None:
    size = hidden.shape[-1]
    rows, heads = output.numel() // size, hidden.shape[1] if hidden.dim() == 3 else 1
    tile_rows, tile_size, num_warps = tile(size)
    if rows == 0:
        return
    rms_norm_kernel[(cdiv(rows, tile_rows),)](
        hidden,
        chosen,
        before,
        residual,
        weight,
        as_bytes(output),
        scales,
        rows,
        heads,
        hidden.stride(0),
        hidden.stride(1) if heads > 1 else 0,
        0 if residual is None else residual.stride(0),
        eps,
        largest=0.0 if scales is None else LARGEST[output.dtype],
        to_fp8=scales is not None and converts_fp8(hidden.device),
        size=size,
        tile_rows=tile_rows,
        tile_size=tile_size,
        num_warps=num_warps,
        **begins_early(hidden.device),
    )


@rms_norm.implementation("cuda", name="triton", unavailable=why_not)
def rms_norm_triton(hidden: Tensor, weight: Tensor, eps: float) -> Tensor:
    """hidden: [num_tokens, size] or [num_tokens, heads, size], with any strides before the last."""
    if hidden.dim() not in (2, 3) or not _are_rows(hidden, weight):
        return rms_norm.reference(hidden, weight, eps)
    output = torch.empty_like(hidden, memory_format=torch.contiguous_format)
    _launch(hidden, None, weight, eps, output)
    return output


@add_rms_norm.implementation("cuda", name="triton", unavailable=why_not)
def add_rms_norm_triton(
    hidden: Tensor, residual: Tensor, weight: Tensor, eps: float, before: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Writes the sum into `residual`."""
    if hidden.dim() != 2 or not _are_rows(hidden, residual, weight, before):
        return add_rms_norm.reference(hidden, residual, weight, eps, before)
    output = torch.empty_like(hidden, memory_format=torch.contiguous_format)
    _launch(hidden, residual, weight, eps, output, before=before)
    return output, residual


@rms_norm_of_rows.implementation("cuda", name="triton", unavailable=why_not)
def rms_norm_of_rows_triton(
    hidden: Tensor,
    rows: Tensor,
    weight: Tensor,
    eps: float,
    added: Tensor | None = None,
    before: Tensor | None = None,
) -> Tensor:
    """hidden, added: [num_tokens, size], with any strides between rows; rows: contiguous."""
    if hidden.dim() != 2 or not _are_rows(hidden, weight, added, before):
        return rms_norm_of_rows.reference(hidden, rows, weight, eps, added, before)
    output = hidden.new_empty(len(rows), hidden.shape[1])
    if added is None:
        _launch(hidden, None, weight, eps, output, chosen=rows)
    else:
        _launch(added, hidden, weight, eps, output, before=before, chosen=rows)
    return output


@layer_norm.implementation("cuda", name="triton", unavailable=why_not)
def layer_norm_triton(hidden: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    """hidden: [num_tokens, size], with any stride between rows."""
    if hidden.dim() != 2 or not _are_rows(hidden, weight, bias):
        return layer_norm.reference(hidden, weight, bias, eps)
    output = torch.empty_like(hidden, memory_format=torch.contiguous_format)
    rows, size = hidden.shape
    tile_rows, tile_size, num_warps = tile(size)
    if rows:
        layer_norm_kernel[(cdiv(rows, tile_rows),)](
            hidden,
            weight,
            bias,
            output,
            rows,
            hidden.stride(0),
            eps,
            size=size,
            tile_rows=tile_rows,
            tile_size=tile_size,
            num_warps=num_warps,
            **begins_early(hidden.device),
        )
    return output


@quantize_rows.implementation("cuda", name="triton", unavailable=why_not)
def quantize_rows_triton(hidden: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """hidden: [num_tokens, size], with any stride between rows."""
    if hidden.dim() != 2 or not _are_rows(hidden):
        return quantize_rows.reference(hidden, dtype)
    elements, scales = _quantized(hidden, dtype)
    _launch(hidden, None, None, 0.0, elements, scales)
    return elements, scales


@add_rms_norm_quantized.implementation("cuda", name="triton", unavailable=why_not)
def add_rms_norm_quantized_triton(
    hidden: Tensor,
    residual: Tensor,
    weight: Tensor,
    eps: float,
    dtype: torch.dtype,
    before: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Writes the sum into `residual`."""
    if hidden.dim() != 2 or not _are_rows(hidden, residual, weight, before):
        return add_rms_norm_quantized.reference(hidden, residual, weight, eps, dtype, before)
    elements, scales = _quantized(hidden, dtype)
    _launch(hidden, residual, weight, eps, elements, scales, before)
    return elements, scales, residual


def _quantized(hidden: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    elements = torch.empty(hidden.shape, dtype=dtype, device=hidden.device)
    return elements, torch.empty(len(hidden), dtype=torch.float32, device=hidden.device)


def _compiled() -> tuple[Specialisation, ...]:
    forms = []
    numbers = {"rows": "i32", "token_stride": "i32:16", "eps": "fp32"}
    for size in (64, 128, 4096, 5120, 16384):
        rows, columns, warps = tile(size)
        shape: dict[str, Any] = {"size": size, "tile_rows": rows, "tile_size": columns}
        alone = {
            "chosen": None,
            "before": None,
            "residual": None,
            "scales": None,
            "largest": 0.0,
            "to_fp8": False,
            "residual_stride": 0,
        }
        own = dict.fromkeys(("hidden", "weight", "output"), "*bf16") | numbers
        if size <= 128:
            of_heads = own | {"heads": "i32", "head_stride": "i32:16"}
            forms.append(Specialisation(rms_norm_kernel, of_heads, shape | alone, warps))
            continue
        single = {"heads": 1, "head_stride": 0}
        forms.append(Specialisation(rms_norm_kernel, own, shape | alone | single, warps))
        with_sum = own | {"residual": "*bf16", "residual_stride": "i32:16"}
        nothing = single | {"scales": None, "largest": 0.0, "to_fp8": False}
        first = {"chosen": None, "before": None}
        forms.append(Specialisation(rms_norm_kernel, with_sum, shape | nothing | first, warps))
        twice = with_sum | {"before": "*bf16"}
        every = {"chosen": None}
        few = "two words, on Ampere" if size == 5120 else ""
        constants = shape | nothing | every
        forms.append(Specialisation(rms_norm_kernel, twice, constants, warps, spills=few))
        some = with_sum | {"chosen": "*i64"}
        unnormed = {"before": None}
        forms.append(Specialisation(rms_norm_kernel, some, shape | nothing | unnormed, warps))
        forms.append(
            Specialisation(layer_norm_kernel, own | {"bias": "*bf16"}, shape, warps),
        )
        for dtype, since in (
            (torch.int8, 80),
            (torch.float8_e4m3fn, 80),
            (torch.float8_e4m3fn, 89),
        ):
            kept = {"output": "*i8" if dtype == torch.int8 else "*u8", "scales": "*fp32"}
            constants = shape | single | {"largest": LARGEST[dtype], "to_fp8": since == 89}
            constants |= first
            behind = with_sum | kept
            forms.append(Specialisation(rms_norm_kernel, behind, constants, warps, since=since))
            plain = {name: kind for name, kind in (own | kept).items() if name != "weight"}
            nothing = {"residual": None, "weight": None, "residual_stride": 0}
            constants |= nothing
            forms.append(Specialisation(rms_norm_kernel, plain, constants, warps, since=since))
    return tuple(forms)


COMPILED = early_forms(_compiled())
