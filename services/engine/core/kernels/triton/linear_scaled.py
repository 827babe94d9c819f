"""Projections of eight bits by eight in Triton: int8, or float8_e4m3fn where the card has it.

The matrix units multiply levels as they are, at twice the rate of 16 bits; what they add up is
scaled once, by the row's scale and the output's. Programs run in groups of tiles that share rows
and outputs, so that what they read stays in the L2 cache (Tillet's matrix product, in Triton's
tutorials, has the same order). Few rows are split along the inputs as other projections are.

Hopper's matrix units add up products of eight-bit floats in fewer bits than float32 has; every
`_EXACT_INPUTS` inputs the sum is added to one in float32 (DeepSeek-AI, arXiv:2412.19437).
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor
from triton import jit
from triton import language as tl

from services.engine.core.kernels.linear import scaled_linear
from services.engine.core.kernels.matrices import ScaledMatrix
from services.engine.core.kernels.triton import why_not
from services.engine.core.kernels.triton.language import INTERPRETED, wait_for_earlier
from services.engine.core.kernels.triton.linear_splits import Division, Tile, Tiles
from services.engine.core.kernels.triton.serving import begins_early, converts_fp8, early_forms
from services.engine.core.kernels.triton.specialisation import Specialisation

_EXACT_INPUTS = tl.constexpr(128)
# Tiles of outputs that run together: 16 of 128 outputs and 4096 inputs are 8 MB of the L2 cache.
_GROUP_TILES = 16
_TILES: Tiles = (
    (16, Tile(rows=16, outputs=64, inputs=256, num_warps=4, num_stages=4)),
    (32, Tile(rows=32, outputs=64, inputs=256, num_warps=4, num_stages=4)),
    (64, Tile(rows=64, outputs=128, inputs=128, num_warps=4, num_stages=4, resident=2)),
    (1 << 31, Tile(rows=128, outputs=128, inputs=128, num_warps=8, num_stages=4, resident=1)),
)


@jit
def _add_product(a, b, total):  # type: ignore[no-untyped-def]
    """total + a * b: sums of int8 are int32."""
    if total.dtype == tl.int32:
        result = tl.dot(a, b, total, out_dtype=tl.int32)
    elif INTERPRETED:
        result = tl.dot(a.to(tl.float32), b.to(tl.float32), total)
    else:
        result = tl.dot(a, b, total, max_num_imprecise_acc=_EXACT_INPUTS)
    return result


@jit(do_not_specialize=["rows", "steps_of_split"])
def scaled_linear_kernel(  # type: ignore[no-untyped-def]
    elements,
    row_scales,
    weight,
    weight_scales,
    bias,
    output,
    rows,
    outputs,
    inputs,
    steps_of_split,
    is_whole: tl.constexpr,
    is_split: tl.constexpr,
    tile_rows: tl.constexpr,
    tile_outputs: tl.constexpr,
    tile_inputs: tl.constexpr,
    group_tiles: tl.constexpr,
    is_early: tl.constexpr,
):
    """One tile of a projection, or of one split of it: [splits, rows, outputs] float32.

    is_whole: whether inputs are whole tiles.
    """
    wait_for_earlier(is_early)
    # All tiles of rows go through one group of tiles of outputs before the next group begins.
    row_tiles, column_tiles = tl.cdiv(rows, tile_rows), tl.cdiv(outputs, tile_outputs)
    index, split = tl.program_id(0), tl.program_id(1)
    first_column = index // (row_tiles * group_tiles) * group_tiles
    width = tl.minimum(column_tiles - first_column, group_tiles)
    within = index % (row_tiles * group_tiles)
    row = within // width * tile_rows + tl.arange(0, tile_rows)
    column = (first_column + within % width) * tile_outputs + tl.arange(0, tile_outputs)
    has_row, has_column = (row < rows)[:, None], (column < outputs)[None, :]

    place = tl.arange(0, tile_inputs)
    element_of = elements + row.to(tl.int64)[:, None] * inputs + place[None, :]
    weight_of = weight + column.to(tl.int64)[None, :] * inputs + place[:, None]
    is_int8: tl.constexpr = elements.dtype.element_ty == tl.int8
    total = tl.zeros((tile_rows, tile_outputs), tl.int32 if is_int8 else tl.float32)
    first_step = split * steps_of_split
    last_step = tl.minimum(first_step + steps_of_split, tl.cdiv(inputs, tile_inputs))
    for step in range(first_step, last_step):
        start = step * tile_inputs
        has_element, has_weight = has_row, has_column
        if not is_whole:
            has_element = has_row & (start + place < inputs)[None, :]
            has_weight = has_column & (start + place < inputs)[:, None]
        own = tl.load(element_of + start, mask=has_element, other=0.0)
        others = tl.load(weight_of + start, mask=has_weight, other=0.0)
        total = _add_product(own, others, total)

    row_scale = tl.load(row_scales + row, mask=row < rows, other=0.0)
    weight_scale = tl.load(weight_scales + column, mask=column < outputs, other=0.0)
    result = total.to(tl.float32) * row_scale[:, None] * weight_scale[None, :]
    if is_split:
        output += split.to(tl.int64) * rows * outputs
    elif bias is not None:
        result += tl.load(bias + column, mask=column < outputs, other=0.0).to(tl.float32)[None, :]
    place_of = row.to(tl.int64)[:, None] * outputs + column[None, :]
    tl.store(output + place_of, result, mask=has_row & has_column)


@scaled_linear.implementation("cuda", name="triton", unavailable=why_not)
def scaled_linear_triton(
    elements: Tensor,
    scales: Tensor,
    weight: ScaledMatrix,
    bias: Tensor | None,
    dtype: torch.dtype,
) -> Tensor:
    """elements, scales: contiguous."""
    is_served = elements.dtype == torch.int8 or elements.device.type == "cpu"
    if not (is_served or converts_fp8(elements.device)):
        return scaled_linear.reference(elements, scales, weight, bias, dtype)
    (rows, inputs), outputs = elements.shape, weight.shape[0]
    output = scales.new_empty(rows, outputs, dtype=dtype)
    if not rows:
        return output
    division = Division.of(_TILES, rows, weight.shape, elements.device)

    def run(there: Tensor) -> None:
        scaled_linear_kernel[(division.row_tiles * division.column_tiles, division.splits)](
            elements,
            scales,
            weight.elements,
            weight.scales,
            bias,
            there,
            rows,
            outputs,
            inputs,
            division.steps_of_split,
            group_tiles=_GROUP_TILES,
            **division.options,
            **begins_early(elements.device),
        )

    division.compute(run, bias, output)
    return output


def _why_not_scaled_mm() -> str | None:
    """torch's product of eight-bit floats takes scales by row and by output on Hopper alone."""
    if not torch.cuda.is_available():
        return "there is no CUDA device"
    if torch.cuda.get_device_capability() < (9, 0):
        return "the card is older than Hopper"
    return None


# With fewer rows, its tiles of 128 are mostly empty.
_SCALED_MM_FROM_ROWS = 64


@scaled_linear.implementation("cuda", name="cutlass", unavailable=_why_not_scaled_mm)
def scaled_linear_cutlass(
    elements: Tensor,
    scales: Tensor,
    weight: ScaledMatrix,
    bias: Tensor | None,
    dtype: torch.dtype,
) -> Tensor:
    """By `torch._scaled_mm`: eight-bit floats, of many rows, in multiples of 16."""
    outputs, inputs = weight.shape
    is_served = (
        elements.dtype == torch.float8_e4m3fn
        and dtype == torch.bfloat16
        and len(elements) >= _SCALED_MM_FROM_ROWS
        and outputs % 16 == 0
        and inputs % 16 == 0
    )
    if not is_served:
        return scaled_linear_triton(elements, scales, weight, bias, dtype)
    return torch._scaled_mm(
        elements,
        weight.elements.T,
        scale_a=scales[:, None],
        scale_b=weight.scales[None, :],
        bias=bias,
        out_dtype=dtype,
    )


def _forms() -> Iterator[Specialisation]:
    numbers = {"outputs": "i32:16", "inputs": "i32:16", "rows": "i32", "steps_of_split": "i32"}
    for kind in ("*i8", "*fp8e4nv"):
        signature = {"elements": kind, "weight": kind, "output": "*bf16", **numbers}
        signature |= {"row_scales": "*fp32", "weight_scales": "*fp32"}
        for _, tile in _TILES:
            is_split = tile.rows <= 32
            constants = {
                "bias": None,
                "is_whole": True,
                "is_split": is_split,
                **tile.constants,
                "group_tiles": _GROUP_TILES,
            }
            own = signature | ({"output": "*fp32"} if is_split else {})
            yield Specialisation(
                scaled_linear_kernel, own, constants, tile.num_warps, tile.num_stages
            )


COMPILED = early_forms(_forms())
