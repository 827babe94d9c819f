"""Which experts tokens go through, in Triton, and whose rows are whose.

Choices (of a token, an expert) are ordered by expert on the device, in blocks of rows that have one
expert each; where there are fewer than the worst case has, the last blocks are nobody's. So what
is launched depends on the number of tokens alone, and a CUDA graph can hold it.
"""

from __future__ import annotations

import torch
from torch import Tensor
from triton import cdiv, jit, next_power_of_2
from triton import language as tl

from services.engine.core.kernels.experts import choose_experts
from services.engine.core.kernels.triton import why_not
from services.engine.core.kernels.triton.language import rounded, wait_for_earlier
from services.engine.core.kernels.triton.serving import FLOATS, begins_early, early_forms
from services.engine.core.kernels.triton.specialisation import Specialisation

# As many choices one program puts in order by itself, in one launch instead of three.
_ONE_PROGRAM = 4096
_CHUNK = 1024
_TABLE_TILE = 64
# A table of the blocks of rows, one line each: the expert, its block's first row, its last.
_TABLE = 3


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
    is_early: tl.constexpr,
):
    """One token, in one warp: its largest logits, one after another."""
    wait_for_earlier(is_early)
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
    expert_ids,
    counts,
    choices,
    experts: tl.constexpr,
    bins: tl.constexpr,
    tile: tl.constexpr,
    is_early: tl.constexpr,
):
    """Add to `counts` how many of a tile's choices are of each expert."""
    wait_for_earlier(is_early)
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
    expert_ids, cursors, order, choices, tile: tl.constexpr, is_early: tl.constexpr
):
    """Put a tile's choices in their places."""
    wait_for_earlier(is_early)
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
    is_early: tl.constexpr,
):
    """One program: where each expert's rows begin, and which blocks of rows are whose. Without
    `counts`, it also counts choices, of which there is one tile, and puts them in order."""
    wait_for_earlier(is_early)
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
def rows_of_block(order, table, block, rows: tl.constexpr):  # type: ignore[no-untyped-def]
    """The rows of a block, in the order of experts; whether each is one; and its choice."""
    place = tl.load(table + block * 3 + 1) + tl.arange(0, rows)
    inside = place < tl.load(table + block * 3 + 2)
    return place.to(tl.int64), inside, tl.load(order + place, inside, other=0)


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
            **begins_early(logits.device),
        )
    return ids, shares


def plan(expert_ids: Tensor, experts: int, block_rows: int) -> tuple[Tensor, Tensor]:
    """The choices in the order of their experts, int32, and the table of blocks of rows, as many
    as there can be: each expert has one that is not full."""
    choices, device = len(expert_ids), expert_ids.device
    early = begins_early(device)
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
            expert_ids,
            counts,
            choices,
            experts=experts,
            bins=bins,
            tile=_CHUNK,
            num_warps=4,
            **early,
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
        **early,
    )
    if not fits:
        place_kernel[(cdiv(choices, _CHUNK),)](
            expert_ids, cursors, order, choices, tile=_CHUNK, num_warps=4, **early
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
    for kind, experts, per_token in (("*bf16", 8, 2), ("*fp16", 128, 8)):
        chosen = {"logits": kind, "shares": kind, "ids": "*i64", "row_stride": "i32"}
        sizes = {"tile": experts, "tile_chosen": per_token, "normalize": True}
        sizes |= {"experts": experts, "per_token": per_token}
        forms.append(Specialisation(choose_kernel, chosen, sizes, 1))
    return tuple(forms)


COMPILED = early_forms(_compiled())
