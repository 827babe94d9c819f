"""Mixtures of experts in Triton, without the host knowing which experts a step uses.

Choices (of a token, an expert) are ordered by expert on the device. Then the rows of all experts go
through two products of matrices, each one launch: a program looks up which expert its rows belong
to, and where there are fewer rows than the worst case has, programs end at once. So the launches
depend on the number of tokens alone, and a CUDA graph can hold them.

A product of few rows is bound by reading weights: then tiles are narrow, for many programs to read
at once, and deep, for each to have much under way. Of many rows it is bound by the matrix units.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor
from triton import cdiv, jit, next_power_of_2
from triton import language as tl

from services.engine.core.kernels.experts import choose_experts, mixture_of_experts
from services.engine.core.kernels.triton import why_not
from services.engine.core.kernels.triton.language import dot, rounded, silu
from services.engine.core.kernels.triton.serving import FLOATS
from services.engine.core.kernels.triton.specialisation import AMPERE, HOPPER, Specialisation

# As many choices one program puts in order by itself, in one launch instead of three.
_ONE_PROGRAM = 4096
_CHUNK = 1024
_TABLE_TILE = 64
# A table of the blocks of rows, one line each: the expert, its block's first row, its last.
_TABLE = 3
_COMBINE_TILE = 1024


@jit
def choose_kernel(  # type: ignore[no-untyped-def]
    logits,
    ids,
    shares,
    row_stride,
    experts: tl.constexpr,
    per_token: tl.constexpr,
    normalize: tl.constexpr,
    tile: tl.constexpr,
    tile_chosen: tl.constexpr,
):
    """One token, in one warp: its largest logits, one after another."""
    token = tl.program_id(0).to(tl.int64)
    expert = tl.arange(0, tile)
    values = tl.load(
        logits + token * row_stride + expert, expert < experts, other=-float("inf")
    ).to(tl.float32)
    values = tl.exp(values - tl.max(values, 0))
    values = values / tl.sum(values, 0)
    place = tl.arange(0, tile_chosen)
    chosen = tl.zeros((tile_chosen,), tl.float32)
    for index in tl.static_range(per_token):
        share, owner = tl.max(values, 0, return_indices=True)
        owner = tl.minimum(owner, experts - 1)  # of what is no number, it may be any
        chosen = tl.where(place == index, share, chosen)
        tl.store(ids + token * per_token + index, owner.to(tl.int64))
        values = tl.where(expert == owner, -1.0, values)
    if normalize:
        chosen = chosen / tl.sum(chosen, 0)
    there = shares + token * per_token + place
    tl.store(there, rounded(chosen, shares.dtype.element_ty), place < per_token)


@jit(do_not_specialize=["choices"])
def count_kernel(  # type: ignore[no-untyped-def]
    expert_ids, counts, choices, experts: tl.constexpr, bins: tl.constexpr, tile: tl.constexpr
):
    """Add to `counts` how many of a tile's choices are of each expert."""
    choice = tl.program_id(0) * tile + tl.arange(0, tile)
    ids = tl.load(expert_ids + choice, choice < choices, other=experts).to(tl.int32)
    expert = tl.arange(0, bins)
    tl.atomic_add(counts + expert, tl.histogram(ids, bins), expert < experts)


@jit
def _place(  # type: ignore[no-untyped-def]
    choice, ids, cursors, order, inside
):
    """Each choice takes the next place of its expert. Which is first is nobody's concern: a row of
    a product is computed alike wherever it is."""
    place = tl.atomic_add(cursors + ids, 1, inside)
    tl.store(order + place, choice, inside)


@jit(do_not_specialize=["choices"])
def place_kernel(  # type: ignore[no-untyped-def]
    expert_ids, cursors, order, choices, tile: tl.constexpr
):
    """Put a tile's choices in their places."""
    choice = tl.program_id(0) * tile + tl.arange(0, tile)
    inside = choice < choices
    ids = tl.load(expert_ids + choice, inside, other=0).to(tl.int32)
    _place(choice, ids, cursors, order, inside)


@jit(do_not_specialize=["choices", "blocks"])
def plan_kernel(  # type: ignore[no-untyped-def]
    expert_ids,
    counts,
    cursors,
    order,
    table,
    choices,
    blocks,
    experts: tl.constexpr,
    bins: tl.constexpr,
    block_rows: tl.constexpr,
    tile: tl.constexpr,
    table_tile: tl.constexpr,
):
    """One program: where each expert's rows begin, and which blocks of rows are whose. Without
    `counts`, it also counts choices, of which there is one tile, and puts them in order."""
    expert = tl.arange(0, bins)
    if counts is None:
        choice = tl.arange(0, tile)
        inside = choice < choices
        ids = tl.load(expert_ids + choice, inside, other=experts).to(tl.int32)
        found = tl.histogram(ids, bins)
    else:
        found = tl.load(counts + expert, expert < experts, other=0)
    found = tl.where(expert < experts, found, 0)
    tl.store(cursors + expert, tl.cumsum(found, 0) - found, expert < experts)
    own_blocks = (found + block_rows - 1) // block_rows
    block_ends = tl.cumsum(own_blocks, 0)
    for begin in range(0, blocks, table_tile):
        block = begin + tl.arange(0, table_tile)
        owner = tl.sum((block_ends[None, :] <= block[:, None]).to(tl.int32), 1)
        before = expert[None, :] < owner[:, None]
        first_row = tl.sum(tl.where(before, found[None, :], 0), 1)
        first_block = tl.sum(tl.where(before, own_blocks[None, :], 0), 1)
        rows = tl.sum(tl.where(expert[None, :] == owner[:, None], found[None, :], 0), 1)
        line = table + block * 3
        tl.store(line, tl.where(owner < bins, owner, experts), block < blocks)
        tl.store(line + 1, first_row + (block - first_block) * block_rows, block < blocks)
        tl.store(line + 2, first_row + rows, block < blocks)
    if counts is None:
        tl.debug_barrier()  # all cursors are there
        _place(choice, ids, cursors, order, inside)


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
):
    """inner = silu(hidden * gate^T) * (hidden * up^T), rows in the order of experts."""
    block, tile = _tile_of(blocks, intermediate, tile_columns, group)
    expert = tl.load(table + block * 3)
    if expert < experts:
        place = tl.load(table + block * 3 + 1) + tl.arange(0, block_rows)
        inside = place < tl.load(table + block * 3 + 2)
        token = (tl.load(order + place, inside, other=0) // per_token).to(tl.int64)
        column = tile * tile_columns + tl.arange(0, tile_columns)
        written = inside[:, None] & (column < intermediate)[None, :]
        # Columns beyond the last are computed as another's: they are not stored.
        own = (column % intermediate)[None, :] * size
        gate = weights + expert.to(tl.int64) * (2 * intermediate * size) + own
        up = gate + intermediate * size
        rows = hidden + token[:, None] * row_stride
        gated = tl.zeros((block_rows, tile_columns), tl.float32)
        raised = tl.zeros((block_rows, tile_columns), tl.float32)
        for begin in range(0, size, depth):
            place_in = begin + tl.arange(0, depth)
            is_in = place_in < size
            a = tl.load(rows + place_in[None, :], inside[:, None] & is_in[None, :], other=0.0)
            gated = dot(a, tl.load(gate + place_in[:, None], is_in[:, None], other=0.0), gated)
            raised = dot(a, tl.load(up + place_in[:, None], is_in[:, None], other=0.0), raised)
        values = rounded(silu(gated) * raised, inner.dtype.element_ty)
        there = inner + place[:, None].to(tl.int64) * intermediate + column[None, :]
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
):
    """outer = inner * down^T, times the expert's share, rows in the order of tokens again."""
    block, tile = _tile_of(blocks, size, tile_columns, group)
    expert = tl.load(table + block * 3)
    if expert < experts:
        place = tl.load(table + block * 3 + 1) + tl.arange(0, block_rows)
        inside = place < tl.load(table + block * 3 + 2)
        choice = tl.load(order + place, inside, other=0).to(tl.int64)
        column = tile * tile_columns + tl.arange(0, tile_columns)
        own = (column % size)[None, :] * intermediate
        down = weights + expert.to(tl.int64) * (size * intermediate) + own
        rows = inner + place[:, None].to(tl.int64) * intermediate
        summed = tl.zeros((block_rows, tile_columns), tl.float32)
        for begin in range(0, intermediate, depth):
            place_in = begin + tl.arange(0, depth)
            is_in = place_in < intermediate
            a = tl.load(rows + place_in[None, :], inside[:, None] & is_in[None, :], other=0.0)
            summed = dot(a, tl.load(down + place_in[:, None], is_in[:, None], other=0.0), summed)
        share = tl.load(shares + choice, inside, other=0.0).to(tl.float32)
        values = rounded(summed * share[:, None], outer.dtype.element_ty)
        there = outer + choice[:, None] * size + column[None, :]
        tl.store(there, values, inside[:, None] & (column < size)[None, :])


@jit
def combine_kernel(  # type: ignore[no-untyped-def]
    outer, output, per_token: tl.constexpr, size: tl.constexpr, tile: tl.constexpr
):
    """The sum of what a token's experts made of it, always in the same order."""
    token = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * tile + tl.arange(0, tile)
    summed = tl.zeros((tile,), tl.float32)
    for index in tl.static_range(per_token):
        row = outer + (token * per_token + index) * size
        summed += tl.load(row + column, column < size, other=0.0).to(tl.float32)
    tl.store(
        output + token * size + column, rounded(summed, output.dtype.element_ty), column < size
    )


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


@choose_experts.implementation("cuda", name="triton", unavailable=why_not)
def choose_experts_triton(logits: Tensor, per_token: int, normalize: bool) -> tuple[Tensor, Tensor]:
    """logits may have any stride between rows."""
    num_tokens, experts = logits.shape
    if logits.dtype not in FLOATS or logits.stride(1) != 1:
        return choose_experts.reference(logits, per_token, normalize)
    shape = (num_tokens, per_token)
    ids = torch.empty(shape, dtype=torch.int64, device=logits.device)
    shares = torch.empty(shape, dtype=logits.dtype, device=logits.device)
    if num_tokens:
        choose_kernel[(num_tokens,)](
            logits,
            ids,
            shares,
            logits.stride(0),
            experts=experts,
            per_token=per_token,
            normalize=normalize,
            tile=next_power_of_2(experts),
            tile_chosen=next_power_of_2(per_token),
            num_warps=1,
        )
    return ids, shares


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
    )
    return outer if per_token == 1 else combine(outer, per_token)


def combine(outer: Tensor, per_token: int) -> Tensor:
    """The sums of what experts made of each token, [choices, size] -> [num_tokens, size]."""
    num_tokens, size = len(outer) // per_token, outer.shape[1]
    output = outer.new_empty(num_tokens, size)
    combine_kernel[(num_tokens, cdiv(size, _COMBINE_TILE))](
        outer, output, per_token=per_token, size=size, tile=_COMBINE_TILE, num_warps=4
    )
    return output


def _launch(tiles: _Tiles) -> dict[str, int]:
    return _shape(tiles) | {"num_warps": tiles.num_warps, "num_stages": tiles.num_stages}


def _shape(tiles: _Tiles) -> dict[str, int]:
    return {
        "block_rows": tiles.block_rows,
        "tile_columns": tiles.columns,
        "depth": tiles.depth,
        "group": 8,
    }


def plan(expert_ids: Tensor, experts: int, block_rows: int) -> tuple[Tensor, Tensor]:
    """The choices in the order of their experts, int32, and the table of blocks of rows, as many
    as there can be: each expert has one that is not full."""
    choices, device = len(expert_ids), expert_ids.device
    blocks = min(choices, choices // block_rows + min(experts, choices))
    table = torch.empty((blocks, _TABLE), dtype=torch.int32, device=device)
    order = torch.empty(choices, dtype=torch.int32, device=device)
    cursors = torch.empty(experts, dtype=torch.int32, device=device)
    bins = next_power_of_2(experts + 1)  # one for places that are no choices
    fits = choices <= _ONE_PROGRAM
    counts = None
    if not fits:
        counts = torch.zeros(experts, dtype=torch.int32, device=device)
        count_kernel[(cdiv(choices, _CHUNK),)](
            expert_ids, counts, choices, experts=experts, bins=bins, tile=_CHUNK, num_warps=4
        )
    # At least one for each thread: no thread does the same as another.
    tile = max(256, next_power_of_2(choices)) if fits else _CHUNK
    plan_kernel[(1,)](
        expert_ids,
        counts,
        cursors,
        order,
        table,
        choices,
        blocks,
        experts=experts,
        bins=bins,
        block_rows=block_rows,
        tile=tile,
        table_tile=_TABLE_TILE,
        num_warps=8,
    )
    if not fits:
        place_kernel[(cdiv(choices, _CHUNK),)](
            expert_ids, cursors, order, choices, tile=_CHUNK, num_warps=4
        )
    return order, table


def _compiled() -> tuple[Specialisation, ...]:
    counted = {"expert_ids": "*i64", "choices": "i32"}
    planned = counted | dict.fromkeys(("cursors", "order", "table"), "*i32") | {"blocks": "i32"}
    placed = counted | {"cursors": "*i32", "order": "*i32"}
    alone = {"counts": None, "tile": _ONE_PROGRAM}
    forms = [Specialisation(place_kernel, placed, {"tile": _CHUNK})]
    for experts in (8, 128):
        bins = {"experts": experts, "bins": next_power_of_2(experts + 1)}
        counts = counted | {"counts": "*i32"}
        forms.append(Specialisation(count_kernel, counts, bins | {"tile": _CHUNK}))
        shape = bins | {"block_rows": 16, "table_tile": _TABLE_TILE}
        forms.append(Specialisation(plan_kernel, planned, shape | alone, 8))
        many = planned | {"counts": "*i32"}
        forms.append(Specialisation(plan_kernel, many, shape | {"tile": _CHUNK}, 8))
    # Mixtral 8x7B and Qwen3 30B-A3B.
    for kind, experts, per_token, size, intermediate in (
        ("*bf16", 8, 2, 4096, 14336),
        ("*fp16", 128, 8, 2048, 768),
    ):
        of_model = {"experts": experts, "size": size, "intermediate": intermediate}
        chosen = {"logits": kind, "shares": kind, "ids": "*i64", "row_stride": "i32"}
        sizes = {"tile": experts, "tile_chosen": per_token, "normalize": True}
        sizes |= {"experts": experts, "per_token": per_token}
        forms.append(Specialisation(choose_kernel, chosen, sizes, 1))
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
        combined = {"per_token": per_token, "size": size, "tile": _COMBINE_TILE}
        forms.append(Specialisation(combine_kernel, {"outer": kind, "output": kind}, combined))
    return tuple(forms)


COMPILED = _compiled()
