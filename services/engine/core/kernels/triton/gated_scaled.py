"""Gated projections of eight bits in Triton: the gate and the rounding behind it are one pass,
which reads both halves of a row and writes a quarter of their bytes."""

from __future__ import annotations

import torch
from torch import Tensor
from triton import jit
from triton import language as tl

from services.engine.core.kernels.gated_linear import gated_scaled_linear
from services.engine.core.kernels.linear import scaled_linear
from services.engine.core.kernels.matrices import ScaledMatrix
from services.engine.core.kernels.quantized_rows import LARGEST
from services.engine.core.kernels.triton import why_not
from services.engine.core.kernels.triton.language import (
    gated,
    keep_rounded,
    wait_for_earlier,
)
from services.engine.core.kernels.triton.normalization import LONGEST_ROW, tile
from services.engine.core.kernels.triton.serving import (
    FLOATS,
    as_bytes,
    begins_early,
    converts_fp8,
    early_forms,
)
from services.engine.core.kernels.triton.specialisation import Specialisation


@jit
def gated_rows_kernel(  # type: ignore[no-untyped-def]
    gate_up,
    output,
    scales,
    largest: tl.constexpr,
    to_fp8: tl.constexpr,
    size: tl.constexpr,
    is_silu: tl.constexpr,
    tile_size: tl.constexpr,
    is_early: tl.constexpr,
):
    """One row: activation(gate) * up, [rows, size] of [rows, 2 * size], rounded."""
    wait_for_earlier(is_early)
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, tile_size)
    inside = column < size
    begin = gate_up + row * (2 * size)
    values = gated(begin + column, begin + size + column, inside, is_silu)
    values = values.to(tl.float32)
    scale = tl.max(tl.abs(values), 0) / largest
    tl.store(scales + row, scale)
    keep_rounded(output + row * size + column, values, scale, inside, to_fp8)


@gated_scaled_linear.implementation("cuda", name="triton", unavailable=why_not)
def gated_scaled_linear_triton(
    elements: Tensor,
    scales: Tensor,
    weight: ScaledMatrix,
    bias: Tensor | None,
    dtype: torch.dtype,
    activation: str,
) -> tuple[Tensor, Tensor]:
    """Halves of up to LONGEST_ROW outputs; the projection is whichever serves it best."""
    size = weight.shape[0] // 2
    if size > LONGEST_ROW or dtype not in FLOATS:
        return gated_scaled_linear.reference(elements, scales, weight, bias, dtype, activation)
    gate_up = scaled_linear(elements, scales, weight, bias, dtype)
    kept = torch.empty((len(gate_up), size), dtype=elements.dtype, device=elements.device)
    kept_scales = scales.new_empty(len(gate_up))
    if len(gate_up):
        _, tile_size, num_warps = tile(size)
        gated_rows_kernel[(len(gate_up),)](
            gate_up,
            as_bytes(kept),
            kept_scales,
            largest=LARGEST[kept.dtype],
            to_fp8=converts_fp8(kept.device),
            size=size,
            is_silu=activation == "silu",
            tile_size=tile_size,
            num_warps=num_warps,
            **begins_early(kept.device),
        )
    return kept, kept_scales


COMPILED = early_forms(
    Specialisation(
        gated_rows_kernel,
        {"gate_up": "*bf16", "output": kind, "scales": "*fp32"},
        {
            "largest": LARGEST[torch.int8 if kind == "*i8" else torch.float8_e4m3fn],
            "to_fp8": since == 89,
            "size": size,
            "is_silu": size != 9216,
            "tile_size": tile(size)[1],
        },
        tile(size)[2],
        since=since,
    )
    for size in (14336, 9216, 28672)
    for kind, since in (("*i8", 80), ("*u8", 89))
)
