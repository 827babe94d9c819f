"""Projections by weights of eight and four bits in groups, in Triton.

A program computes a tile of outputs for a tile of rows. Levels come in pieces of 16 bytes, are
turned into the precision of the activations in registers and multiplied by the matrix units. Of
four bits, 16 bytes are 32 inputs: the low halves of all bytes of a tile are one operand and the
high halves another, each with the activations that belong to it, so that nothing is interleaved.

With few rows a step waits for weights, and what counts is that enough of them are under way: tiles
are narrow, and split along the inputs where that leaves multiprocessors idle. With many, each tile
of rows turns all weights into floats again, four to five instructions each: in a tile of 128 rows
as much time as 60 % of the products take. Two programs share a multiprocessor, so that one does it
while the other multiplies; tiles of 256 rows would do it half as often, but have a multiprocessor
to themselves (215 registers, 112 KB) and wait for it. From `FLOATS_FROM_ROWS` on the matrix is
therefore turned into floats once and multiplied by cuBLAS, a slice at a time that stays in the L2
cache: written and read once, 2 bytes a weight at 3 TB/s, a weight costs 0.85 ps more, and its
product with a row takes 2.5 ps / 1000 at 800 TFLOP/s, in this kernel's tiles 4.2 at best. That is
even at 500 rows.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from triton import cdiv, jit
from triton import language as tl

from services.engine.core.kernels.linear import grouped_embedding, grouped_linear
from services.engine.core.kernels.matrices import GroupedMatrix
from services.engine.core.kernels.triton import why_not
from services.engine.core.kernels.triton.language import dot, rounded, wait_for_earlier
from services.engine.core.kernels.triton.linear_splits import Division, Tile, Tiles
from services.engine.core.kernels.triton.serving import begins_early, early_forms
from services.engine.core.kernels.triton.specialisation import Specialisation

FLOATS_FROM_ROWS = 512
# Of a slice in 16 bits: half of an H100's L2 cache.
_SLICE_BYTES = 24 << 20
# Of a row that is turned into floats, by a program: 16 bytes for each thread.
_ROW_INPUTS = 2048
# With 64 rows by 128 outputs and four warps, Triton would write the operand of four bits to shared
# memory by twos of bytes.
_TILES: Tiles = (
    (16, Tile(rows=16, outputs=64, inputs=128, num_warps=4, num_stages=4)),
    (32, Tile(rows=32, outputs=64, inputs=128, num_warps=4, num_stages=4)),
    (64, Tile(rows=64, outputs=64, inputs=128, num_warps=4, num_stages=3, resident=2)),
    (1 << 31, Tile(rows=128, outputs=128, inputs=64, num_warps=8, num_stages=3, resident=2)),
)


@jit
def _values(levels, scale, minimum, centre: tl.constexpr, dtype: tl.constexpr):  # type: ignore[no-untyped-def]
    """What levels stand for, [outputs, groups, size], as [inputs, outputs] of `dtype`."""
    if minimum is None:
        values = (levels.to(tl.float32) - centre) * scale
    else:
        values = levels.to(tl.float32) * scale + minimum
    outputs: tl.constexpr = levels.shape[0]
    inputs: tl.constexpr = levels.shape[1] * levels.shape[2]
    return rounded(values, dtype).reshape(outputs, inputs).trans(1, 0)


@jit
def _read(rows, has_row, start, inputs, group_size: tl.constexpr):  # type: ignore[no-untyped-def]
    """Scales or minima of the groups that hold the inputs `start`, 0 behind the last input."""
    return tl.load(rows + start // group_size, mask=has_row & (start < inputs), other=0.0)


@jit
def grouped_product(  # type: ignore[no-untyped-def]
    own_rows,
    has_row,
    levels,
    scales,
    minima,
    column,
    has_column,
    inputs,
    row_bytes,
    row_groups,
    first_step,
    last_step,
    bits: tl.constexpr,
    group_size: tl.constexpr,
    is_whole: tl.constexpr,
    tile_rows: tl.constexpr,
    tile_outputs: tl.constexpr,
    tile_inputs: tl.constexpr,
):
    """The product of a tile of rows and one of outputs over some steps of inputs, float32.

    own_rows: where rows begin, int64 [tile_rows, 1]; column: outputs, int64 [tile_outputs].
    is_whole: whether inputs are whole tiles.
    """
    # A tile has several groups, or a part of one.
    group_inputs: tl.constexpr = min(group_size, tile_inputs)
    groups: tl.constexpr = tile_inputs // group_inputs
    group_bytes: tl.constexpr = group_inputs * bits // 8
    tile_bytes: tl.constexpr = tile_inputs * bits // 8
    group = tl.arange(0, groups)[None, :, None]
    byte = tl.arange(0, group_bytes)[None, None, :]
    wide_column, has_column = column[:, None, None], has_column[:, None, None]
    level_of = levels + wide_column * row_bytes + group * group_bytes + byte
    scale_of = scales + wide_column * row_groups
    minimum_of = None if minima is None else minima + wide_column * row_groups
    # Which input of a tile each byte is, or its low half.
    place = tl.arange(0, tile_bytes)
    if bits == 4:
        place = place // 16 * 32 + place % 16
    hidden_of = own_rows + place[None, :]

    # Scales come in pieces that are too small to be copied to shared memory behind one's back, so
    # they are read a step ahead by hand, into registers.
    start_of = group * group_inputs
    next_start = start_of + first_step * tile_inputs
    next_scale = _read(scale_of, has_column, next_start, inputs, group_size)
    next_minimum = next_scale
    if minima is not None:
        next_minimum = _read(minimum_of, has_column, next_start, inputs, group_size)

    total = tl.zeros((tile_rows, tile_outputs), tl.float32)
    for step in range(first_step, last_step):
        start = step * tile_inputs
        has_level, has_hidden = has_column, has_row
        if not is_whole:
            has_level = has_column & (start + group * group_inputs < inputs)
            has_hidden = has_row & (start + place < inputs)[None, :]
        packed = tl.load(level_of + start * bits // 8, mask=has_level, other=0)
        scale, minimum = next_scale.to(tl.float32), None
        next_start = start_of + start + tile_inputs
        next_scale = _read(scale_of, has_column, next_start, inputs, group_size)
        if minima is not None:
            minimum = next_minimum.to(tl.float32)
            next_minimum = _read(minimum_of, has_column, next_start, inputs, group_size)
        first = tl.load(hidden_of + start, mask=has_hidden, other=0.0)
        if bits == 8:
            total = dot(first, _values(packed, scale, minimum, 128, first.dtype), total)
        else:
            second = tl.load(hidden_of + start + 16, mask=has_hidden, other=0.0)
            low, high = packed & 0xF, packed >> 4
            total = dot(first, _values(low, scale, minimum, 8, first.dtype), total)
            total = dot(second, _values(high, scale, minimum, 8, first.dtype), total)
    return total


@jit(do_not_specialize=["rows", "steps_of_split"])
def grouped_linear_kernel(  # type: ignore[no-untyped-def]
    hidden,
    levels,
    scales,
    minima,
    bias,
    output,
    rows,
    outputs,
    inputs,
    row_bytes,
    row_groups,
    steps_of_split,
    hidden_stride,
    bits: tl.constexpr,
    group_size: tl.constexpr,
    is_whole: tl.constexpr,
    is_split: tl.constexpr,
    tile_rows: tl.constexpr,
    tile_outputs: tl.constexpr,
    tile_inputs: tl.constexpr,
    is_early: tl.constexpr,
):
    """One tile of hidden * weight^T + bias, or of one split of it: [splits, rows, outputs] float32.

    is_whole: whether inputs are whole tiles.
    """
    wait_for_earlier(is_early)
    # Tiles of rows that read the same weights run side by side.
    row = tl.program_id(0) * tile_rows + tl.arange(0, tile_rows)
    column = tl.program_id(1) * tile_outputs + tl.arange(0, tile_outputs)
    split = tl.program_id(2)
    first_step = split * steps_of_split
    last_step = tl.minimum(first_step + steps_of_split, tl.cdiv(inputs, tile_inputs))
    has_row = (row < rows)[:, None]
    total = grouped_product(
        hidden + row.to(tl.int64)[:, None] * hidden_stride,
        has_row,
        levels,
        scales,
        minima,
        column.to(tl.int64),
        column < outputs,
        inputs,
        row_bytes,
        row_groups,
        first_step,
        last_step,
        bits,
        group_size,
        is_whole,
        tile_rows,
        tile_outputs,
        tile_inputs,
    )
    inside = has_row & (column < outputs)[None, :]
    if is_split:
        output += split.to(tl.int64) * rows * outputs
    elif bias is not None:
        total += tl.load(bias + column, mask=column < outputs, other=0.0).to(tl.float32)[None, :]
    place_of = row.to(tl.int64)[:, None] * outputs + column[None, :]
    tl.store(output + place_of, total, mask=inside)


@grouped_linear.implementation("cuda", name="triton", unavailable=why_not)
def grouped_linear_triton(hidden: Tensor, weight: GroupedMatrix, bias: Tensor | None) -> Tensor:
    """hidden: bfloat16 or float16, with any stride between rows."""
    if hidden.dtype not in (torch.bfloat16, torch.float16) or hidden.stride(-1) != 1:
        return grouped_linear.reference(hidden, weight, bias)
    if len(hidden) >= FLOATS_FROM_ROWS:
        return _by_slices(hidden, weight, bias)
    (rows, inputs), outputs = hidden.shape, weight.shape[0]
    output = hidden.new_empty(rows, outputs)
    if not rows:
        return output
    division = Division.of(_TILES, rows, weight.shape, hidden.device)

    def run(there: Tensor) -> None:
        grid = division.row_tiles, division.column_tiles, division.splits
        grouped_linear_kernel[grid](
            hidden,
            weight.levels,
            weight.scales,
            weight.minima,
            bias,
            there,
            rows,
            outputs,
            inputs,
            weight.levels.shape[1],
            weight.scales.shape[1],
            division.steps_of_split,
            hidden.stride(0),
            bits=weight.bits,
            group_size=weight.group_size,
            **division.options,
            **begins_early(hidden.device),
        )

    division.compute(run, bias, output)
    return output


@jit
def grouped_rows_kernel(  # type: ignore[no-untyped-def]
    rows,
    levels,
    scales,
    minima,
    output,
    inputs,
    bits: tl.constexpr,
    group_size: tl.constexpr,
    tile_inputs: tl.constexpr,
    is_early: tl.constexpr,
):
    """Some inputs of one row as floats: of row N of the grid, or of the row that rows[N] names."""
    wait_for_earlier(is_early)
    index = tl.program_id(0).to(tl.int64)
    row = index
    if rows is not None:
        row = tl.load(rows + index).to(tl.int64)
    # Pieces of 32 inputs, of which 4 bits have 16 bytes.
    piece_bytes: tl.constexpr = 4 * bits
    piece = tl.program_id(1) * (tile_inputs // 32) + tl.arange(0, tile_inputs // 32)[:, None]
    byte = tl.arange(0, piece_bytes)[None, :]
    inside = piece * 32 < inputs
    packed = tl.load(
        levels + row * (inputs * bits // 8) + piece * piece_bytes + byte, mask=inside, other=0
    )
    scale_of = row * (inputs // group_size) + piece * 32 // group_size
    scale = tl.load(scales + scale_of, mask=inside, other=0.0).to(tl.float32)
    minimum = -scale * (1 << bits - 1)
    if minima is not None:
        minimum = tl.load(minima + scale_of, mask=inside, other=0.0).to(tl.float32)
    target = output + index * inputs + piece * 32 + byte
    dtype: tl.constexpr = output.dtype.element_ty
    if bits == 8:
        tl.store(target, rounded(packed.to(tl.float32) * scale + minimum, dtype), mask=inside)
    else:
        low, high = (packed & 0xF).to(tl.float32), (packed >> 4).to(tl.float32)
        tl.store(target, rounded(low * scale + minimum, dtype), mask=inside)
        tl.store(target + 16, rounded(high * scale + minimum, dtype), mask=inside)


def _write_rows(rows: Tensor | None, weight: GroupedMatrix, output: Tensor) -> None:
    inputs = weight.shape[1]
    if not output.numel():
        return
    grouped_rows_kernel[(len(output), cdiv(inputs, _ROW_INPUTS))](
        rows,
        weight.levels,
        weight.scales,
        weight.minima,
        output,
        inputs,
        bits=weight.bits,
        group_size=weight.group_size,
        tile_inputs=_ROW_INPUTS,
        **begins_early(output.device),
    )


def float_rows(weight: GroupedMatrix, dtype: torch.dtype) -> Tensor:
    """A matrix in floats, [outputs, inputs]."""
    output = weight.scales.new_empty(weight.shape, dtype=dtype)
    _write_rows(None, weight, output)
    return output


def _by_slices(hidden: Tensor, weight: GroupedMatrix, bias: Tensor | None) -> Tensor:
    """Some outputs after the other, from weights in floats that lie in one small buffer."""
    outputs, inputs = weight.shape
    step = min(max(_SLICE_BYTES // (inputs * hidden.itemsize) // 128 * 128, 128), outputs)
    output = hidden.new_empty(len(hidden), outputs)
    buffer = hidden.new_empty(step, inputs)
    for start in range(0, outputs, step):
        rows = slice(start, min(start + step, outputs))
        floats = buffer[: rows.stop - rows.start]
        _write_rows(None, weight.rows(rows), floats)
        if bias is None:
            torch.mm(hidden, floats.T, out=output[:, rows])
        else:
            torch.addmm(bias[rows], hidden, floats.T, out=output[:, rows])
    return output


@grouped_embedding.implementation("cuda", name="triton", unavailable=why_not)
def grouped_embedding_triton(
    token_ids: Tensor, weight: GroupedMatrix, dtype: torch.dtype
) -> Tensor:
    """token_ids: int64 or int32, contiguous."""
    output = weight.scales.new_empty(len(token_ids), weight.shape[1], dtype=dtype)
    _write_rows(token_ids, weight, output)
    return output


def _forms() -> Iterator[Specialisation]:
    floats = {"hidden": "*bf16", "output": "*bf16"}
    parts = {"levels": "*u8", "scales": "*fp16"}
    numbers = dict.fromkeys(
        ("outputs", "inputs", "row_bytes", "row_groups", "hidden_stride"), "i32:16"
    )
    numbers |= {"rows": "i32", "steps_of_split": "i32"}
    for bits, group_size, has_minima in (
        (4, 32, True),
        (4, 32, False),
        (4, 128, True),
        (8, 32, False),
    ):
        minima = {"minima": "*fp16"} if has_minima else {}
        own: dict[str, Any] = {"bits": bits, "group_size": group_size}
        own |= {} if has_minima else {"minima": None}
        for _, tile in _TILES:
            is_split = tile.rows <= 32
            shape = {
                "bias": None,
                "is_whole": True,
                "is_split": is_split,
                **tile.constants,
            }
            yield Specialisation(
                grouped_linear_kernel,
                floats | parts | minima | numbers | ({"output": "*fp32"} if is_split else {}),
                own | shape,
                tile.num_warps,
                tile.num_stages,
            )
        signature = {"rows": "*i64", "output": "*bf16", "inputs": "i32:16"} | parts | minima
        yield Specialisation(grouped_rows_kernel, signature, own | {"tile_inputs": _ROW_INPUTS})


COMPILED = early_forms(_forms())
