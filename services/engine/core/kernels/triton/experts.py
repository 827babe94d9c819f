"""Mixtures of experts in Triton, without the host knowing which experts a step uses.

The rows of all experts, in the order of experts_routing.py, go through two products of matrices,
each one launch: a program looks up which expert its rows belong to, and those of rows that are
nobody's end at once.

A product of few rows is bound by reading weights: then tiles are narrow, for many programs to read
at once, and deep, for each to have much under way. Of many rows it is bound by the matrix units.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor
from triton import cdiv, jit
from triton import language as tl

from services.engine.core.kernels.experts import mixture_of_experts
from services.engine.core.kernels.triton import why_not
from services.engine.core.kernels.triton.experts_combine import combine
from services.engine.core.kernels.triton.experts_routing import plan, rows_of_block
from services.engine.core.kernels.triton.language import dot, rounded, silu, wait_for_earlier
from services.engine.core.kernels.triton.serving import begins_early, early_forms
from services.engine.core.kernels.triton.specialisation import AMPERE, HOPPER, Specialisation


@jit
def _tile_of(  # type: ignore[no-untyped-def]
    blocks, columns: tl.constexpr, tile_columns: tl.constexpr, group: tl.constexpr
):
    """The block of rows and the tile of columns of this program: `group` blocks take turns at each
    tile of columns, so that what they share is still in the second-level cache."""
    wide: tl.constexpr = (columns + tile_columns - 1) // tile_columns
    number = tl.program_id(0)
    first = number // (group * wide) * group
    height = tl.minimum(blocks - first, group)
    inner = number % (group * wide)
    return first + inner % height, inner // height


@jit(do_not_specialize=["blocks"])
def gate_up_kernel(  # type: ignore[no-untyped-def]
    hidden,
    weights,
    inner,
    order,
    table,
    blocks,
    row_stride,
    experts: tl.constexpr,
    per_token: tl.constexpr,
    size: tl.constexpr,
    intermediate: tl.constexpr,
    block_rows: tl.constexpr,
    tile_columns: tl.constexpr,
    depth: tl.constexpr,
    group: tl.constexpr,
    is_early: tl.constexpr,
):
    """inner = silu(hidden * gate^T) * (hidden * up^T), rows in the order of experts."""
    wait_for_earlier(is_early)
    block, tile = _tile_of(blocks, intermediate, tile_columns, group)
    expert = tl.load(table + block * 3)
    if expert < experts:
        place, inside, choice = rows_of_block(order, table, block, block_rows)
        column = tile * tile_columns + tl.arange(0, tile_columns)
        written = inside[:, None] & (column < intermediate)[None, :]
        # Columns beyond the last are computed as another's: they are not stored.
        own = (column % intermediate)[None, :] * size
        gate = weights + expert.to(tl.int64) * (2 * intermediate * size) + own
        up = gate + intermediate * size
        rows = hidden + (choice // per_token).to(tl.int64)[:, None] * row_stride
        gated = tl.zeros((block_rows, tile_columns), tl.float32)
        raised = tl.zeros((block_rows, tile_columns), tl.float32)
        for begin in range(0, size, depth):
            place_in = begin + tl.arange(0, depth)
            is_in = place_in < size
            a = tl.load(rows + place_in[None, :], inside[:, None] & is_in[None, :], other=0.0)
            gated = dot(a, tl.load(gate + place_in[:, None], is_in[:, None], other=0.0), gated)
            raised = dot(a, tl.load(up + place_in[:, None], is_in[:, None], other=0.0), raised)
        values = rounded(silu(gated) * raised, inner.dtype.element_ty)
        there = inner + place[:, None] * intermediate + column[None, :]
        tl.store(there, values, written)


@jit(do_not_specialize=["blocks"])
def down_kernel(  # type: ignore[no-untyped-def]
    inner,
    weights,
    shares,
    outer,
    order,
    table,
    blocks,
    experts: tl.constexpr,
    size: tl.constexpr,
    intermediate: tl.constexpr,
    block_rows: tl.constexpr,
    tile_columns: tl.constexpr,
    depth: tl.constexpr,
    group: tl.constexpr,
    is_early: tl.constexpr,
):
    """outer = inner * down^T, times the expert's share, rows in the order of tokens again."""
    wait_for_earlier(is_early)
    block, tile = _tile_of(blocks, size, tile_columns, group)
    expert = tl.load(table + block * 3)
    if expert < experts:
        place, inside, choice = rows_of_block(order, table, block, block_rows)
        column = tile * tile_columns + tl.arange(0, tile_columns)
        own = (column % size)[None, :] * intermediate
        down = weights + expert.to(tl.int64) * (size * intermediate) + own
        rows = inner + place[:, None] * intermediate
        summed = tl.zeros((block_rows, tile_columns), tl.float32)
        for begin in range(0, intermediate, depth):
            place_in = begin + tl.arange(0, depth)
            is_in = place_in < intermediate
            a = tl.load(rows + place_in[None, :], inside[:, None] & is_in[None, :], other=0.0)
            summed = dot(a, tl.load(down + place_in[:, None], is_in[:, None], other=0.0), summed)
        share = tl.load(shares + choice, inside, other=0.0).to(tl.float32)
        values = rounded(summed * share[:, None], outer.dtype.element_ty)
        there = outer + choice.to(tl.int64)[:, None] * size + column[None, :]
        tl.store(there, values, inside[:, None] & (column < size)[None, :])


@dataclass(frozen=True, slots=True)
class _Tiles:
    """Of a product: rows of a block, columns and depth of a tile, warps and stages."""

    block_rows: int
    columns: int
    depth: int
    num_warps: int
    num_stages: int


# By the rows that an expert has on average, at most: of the first product, which has two matrices,
# and of the second.
_TILES = (
    (16, _Tiles(16, 32, 128, 4, 4), _Tiles(16, 32, 256, 4, 4)),
    (32, _Tiles(32, 64, 64, 4, 4), _Tiles(32, 64, 128, 4, 3)),
    (96, _Tiles(64, 64, 64, 4, 4), _Tiles(64, 128, 64, 4, 4)),
)
# Both matrices of the first product at 128 columns are 128 registers of sums: on Hopper, whose
# matrix units read their operands from shared memory, there is room for that.
_LARGE = _Tiles(128, 64, 64, 8, 3), _Tiles(128, 128, 64, 8, 3)
_LARGE_HOPPER = _Tiles(128, 128, 64, 8, 3), _Tiles(128, 128, 64, 8, 4)


@cache
def _is_hopper(device: torch.device) -> bool:
    return device.type == "cuda" and torch.cuda.get_device_capability(device)[0] == 9


def _tiles(rows_per_expert: float, device: torch.device) -> tuple[_Tiles, _Tiles]:
    for most, gate_up, down in _TILES:
        if rows_per_expert <= most:
            return gate_up, down
    return _LARGE_HOPPER if _is_hopper(device) else _LARGE


@mixture_of_experts.implementation("cuda", name="triton", unavailable=why_not)
def mixture_of_experts_triton(
    hidden: Tensor, gate_up: Tensor, down: Tensor, expert_ids: Tensor, expert_weights: Tensor
) -> Tensor:
    """hidden may have any stride between rows."""
    tensors = (hidden, gate_up, down, expert_weights)
    if (
        hidden.dtype not in (torch.bfloat16, torch.float16)
        or any(each.dtype != hidden.dtype for each in tensors)
        or any(not each.is_contiguous() for each in (gate_up, down, expert_weights, expert_ids))
        or hidden.stride(1) != 1
    ):
        return mixture_of_experts.reference(hidden, gate_up, down, expert_ids, expert_weights)
    num_tokens, size = hidden.shape
    experts, _, intermediate = down.shape
    per_token = expert_ids.shape[1]
    choices = num_tokens * per_token
    if choices == 0:
        return torch.zeros_like(hidden)
    first, second = _tiles(choices / experts, hidden.device)
    order, table = plan(expert_ids.view(-1), experts, first.block_rows)
    blocks = len(table)
    inner = torch.empty((choices, intermediate), dtype=hidden.dtype, device=hidden.device)
    gate_up_kernel[(blocks * cdiv(intermediate, first.columns),)](
        hidden,
        gate_up,
        inner,
        order,
        table,
        blocks,
        hidden.stride(0),
        experts=experts,
        per_token=per_token,
        size=size,
        intermediate=intermediate,
        **_launch(first),
        **begins_early(hidden.device),
    )
    outer = torch.empty((choices, size), dtype=hidden.dtype, device=hidden.device)
    down_kernel[(blocks * cdiv(size, second.columns),)](
        inner,
        down,
        expert_weights,
        outer,
        order,
        table,
        blocks,
        experts=experts,
        size=size,
        intermediate=intermediate,
        **_launch(second),
        **begins_early(hidden.device),
    )
    return outer if per_token == 1 else combine(outer, per_token)


def _launch(tiles: _Tiles) -> dict[str, int]:
    return _shape(tiles) | {"num_warps": tiles.num_warps, "num_stages": tiles.num_stages}


def _shape(tiles: _Tiles) -> dict[str, int]:
    return {
        "block_rows": tiles.block_rows,
        "tile_columns": tiles.columns,
        "depth": tiles.depth,
        "group": 8,
    }


def _compiled() -> tuple[Specialisation, ...]:
    forms = []
    # Mixtral 8x7B and Qwen3 30B-A3B.
    for kind, experts, per_token, size, intermediate in (
        ("*bf16", 8, 2, 4096, 14336),
        ("*fp16", 128, 8, 2048, 768),
    ):
        of_model = {"experts": experts, "size": size, "intermediate": intermediate}
        lists = {"order": "*i32", "table": "*i32", "blocks": "i32"}
        first = dict.fromkeys(("hidden", "weights", "inner"), kind) | lists
        first |= {"row_stride": "i32:16"}
        second = dict.fromkeys(("inner", "weights", "shares", "outer"), kind) | lists
        pairs = [(one, two) for _, one, two in _TILES]
        for gate_up, down in (*pairs, _LARGE, _LARGE_HOPPER):
            since = HOPPER if gate_up == _LARGE_HOPPER[0] else AMPERE
            for kernel, signature, tiles in (
                (gate_up_kernel, first, gate_up),
                (down_kernel, second, down),
            ):
                constants = of_model | _shape(tiles)
                if kernel is gate_up_kernel:
                    constants |= {"per_token": per_token}
                few = kernel is gate_up_kernel and tiles.block_rows == 16
                forms.append(
                    Specialisation(
                        kernel,
                        signature,
                        constants,
                        tiles.num_warps,
                        tiles.num_stages,
                        since,
                        spills="one word, on Ampere" if few else "",
                    )
                )
    return tuple(forms)


COMPILED = early_forms(_compiled())
