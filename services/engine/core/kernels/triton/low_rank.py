"""Low-rank adapters in Triton: a pair of kernels for all adapters of a step, which read on the
device which token has which (Chen et al., arXiv:2310.18547; Sheng et al., arXiv:2311.03285).

`shrink` multiplies a token's input by its adapter's `down`, `expand` the result by `up`, and adds
it to the projection. A program has some tokens, and does the adapters that it finds among them one
after another: of a prompt's tokens all have one, and of decoded tokens each program has one. Where
nobody has any, a program reads that and ends. Adapters lie anywhere in memory: a table on the
device says where.
"""

from __future__ import annotations

import torch
from torch import Tensor
from triton import cdiv, jit, next_power_of_2
from triton import language as tl

from services.engine.core.kernels.low_rank import SlottedParts, add_low_ranks
from services.engine.core.kernels.triton import why_not
from services.engine.core.kernels.triton.language import dot, rounded
from services.engine.core.kernels.triton.serving import FLOATS
from services.engine.core.kernels.triton.specialisation import Specialisation

# The matrix units take no fewer rows.
_TILE_ROWS = 16
# In steps of so many tokens and fewer, a program has one of them.
_FEW_TOKENS = 256
_MANY_ROWS = 64
_DEPTH = 128
# Inputs that one program of `shrink` goes through: rank 16 of 4096 inputs is 128 kB, too much for
# one multiprocessor to read in good time.
_SPLIT = 1024
# Where there are many tokens, there are many programs.
_LONG_SPLIT = 8192
_COLUMNS = 128
_SHRINK_RANKS = 64
_EXPAND_RANKS = 32


@jit
def _part_of(table, slot, slot_stride, part, dtype: tl.constexpr):  # type: ignore[no-untyped-def]
    """Where an adapter's matrices are, the rank, the first output and the number of them."""
    row = table + slot * slot_stride + part * 5
    down = tl.multiple_of(tl.load(row).to(tl.pointer_type(dtype)), 16)
    up = tl.multiple_of(tl.load(row + 1).to(tl.pointer_type(dtype)), 16)
    rank = tl.multiple_of(tl.load(row + 2).to(tl.int32), 16)
    return down, up, rank, tl.load(row + 3).to(tl.int32), tl.load(row + 4).to(tl.int32)


@jit(do_not_specialize=["tokens", "slot_stride"])
def shrink_kernel(  # type: ignore[no-untyped-def]
    hidden,
    slots,
    table,
    slot_stride,
    shrunk,
    tokens,
    row_stride,
    inputs: tl.constexpr,
    parts: tl.constexpr,
    max_rank: tl.constexpr,
    split: tl.constexpr,
    own_rows: tl.constexpr,
    tile_rows: tl.constexpr,
    tile_ranks: tl.constexpr,
    depth: tl.constexpr,
):
    """shrunk[split, token, part] = input * down^T, over this split of the inputs: [tiles of tokens,
    parts and tiles of ranks, splits]."""
    own = tl.arange(0, tile_rows)
    token = tl.program_id(0) * own_rows + own
    is_own = (own < own_rows) & (token < tokens)
    slot_of = tl.load(slots + token, is_own, other=-1)
    wide: tl.constexpr = (max_rank + tile_ranks - 1) // tile_ranks
    part = tl.program_id(1) // wide
    rank_of = tl.program_id(1) % wide * tile_ranks + tl.arange(0, tile_ranks)
    begin = tl.program_id(2) * split
    dtype: tl.constexpr = hidden.dtype.element_ty
    row = token.to(tl.int64)
    slot = tl.max(slot_of, 0)
    while slot >= 0:
        down, _, rank, _, _ = _part_of(table, slot, slot_stride, part, dtype)
        inside = slot_of == slot
        summed = tl.zeros((tile_rows, tile_ranks), tl.float32)
        if tl.program_id(1) % wide * tile_ranks < rank:
            for start in range(begin, min(begin + split, inputs), depth):
                place = start + tl.arange(0, depth)
                is_in = place < inputs
                a = tl.load(
                    hidden + row[:, None] * row_stride + place[None, :],
                    inside[:, None] & is_in[None, :],
                    other=0.0,
                )
                b = tl.load(
                    down + rank_of[None, :] * inputs + place[:, None],
                    (rank_of < rank)[None, :] & is_in[:, None],
                    other=0.0,
                )
                summed = dot(a, b, summed)
        there = (tl.program_id(2).to(tl.int64) * tokens + row) * parts + part
        tl.store(
            shrunk + there[:, None] * max_rank + rank_of[None, :],
            summed,
            inside[:, None] & (rank_of < max_rank)[None, :],
        )
        slot = tl.max(tl.where(slot_of < slot, slot_of, -1), 0)


@jit(do_not_specialize=["tokens", "slot_stride"])
def expand_kernel(  # type: ignore[no-untyped-def]
    shrunk,
    slots,
    table,
    slot_stride,
    projected,
    tokens,
    row_stride,
    outputs: tl.constexpr,
    parts: tl.constexpr,
    max_rank: tl.constexpr,
    splits: tl.constexpr,
    own_rows: tl.constexpr,
    tile_rows: tl.constexpr,
    tile_ranks: tl.constexpr,
    columns: tl.constexpr,
):
    """projected += (the sum of the splits) * up^T: [tiles of tokens, tiles of outputs]."""
    own = tl.arange(0, tile_rows)
    token = tl.program_id(0) * own_rows + own
    is_own = (own < own_rows) & (token < tokens)
    slot_of = tl.load(slots + token, is_own, other=-1)
    column = tl.program_id(1) * columns + tl.arange(0, columns)
    dtype: tl.constexpr = projected.dtype.element_ty
    row = token.to(tl.int64)
    slot = tl.max(slot_of, 0)
    while slot >= 0:
        inside = slot_of == slot
        added = tl.zeros((tile_rows, columns), tl.float32)
        for part in range(parts):
            _, up, rank, first, count = _part_of(table, slot, slot_stride, part, dtype)
            output = column - first
            is_changed = (output >= 0) & (output < count)
            reaches = (tl.program_id(1) + 1) * columns > first
            if (rank > 0) & reaches & (tl.program_id(1) * columns < first + count):
                for start in range(0, rank, tile_ranks):
                    rank_of = start + tl.arange(0, tile_ranks)
                    is_in = rank_of < rank
                    a = tl.zeros((tile_rows, tile_ranks), tl.float32)
                    for index in tl.static_range(splits):
                        there = (index * tokens + row) * parts + part
                        a += tl.load(
                            shrunk + there[:, None] * max_rank + rank_of[None, :],
                            inside[:, None] & is_in[None, :],
                            other=0.0,
                        )
                    b = tl.load(
                        up + output[None, :].to(tl.int64) * rank + rank_of[:, None],
                        is_changed[None, :] & is_in[:, None],
                        other=0.0,
                    )
                    added = dot(rounded(a, dtype), b, added)
        there = projected + row[:, None] * row_stride + column[None, :]
        written = inside[:, None] & (column < outputs)[None, :]
        before = tl.load(there, written, other=0.0).to(tl.float32)
        # What an adapter adds is rounded as the reference rounds it.
        added = rounded(added, dtype).to(tl.float32)
        tl.store(there, rounded(before + added, dtype), written)
        slot = tl.max(tl.where(slot_of < slot, slot_of, -1), 0)


@add_low_ranks.implementation("cuda", name="triton", unavailable=why_not)
def add_low_ranks_triton(
    projected: Tensor, hidden: Tensor, slots: Tensor, adapters: SlottedParts
) -> Tensor:
    """projected and hidden may have any stride between rows."""
    if (
        projected.dtype not in FLOATS
        or hidden.dtype != projected.dtype
        or projected.stride(1) != 1
        or hidden.stride(1) != 1
    ):
        return add_low_ranks.reference(projected, hidden, slots, adapters)
    tokens, inputs = hidden.shape
    parts, max_rank = adapters.table.shape[1], next_power_of_2(adapters.max_rank)
    if tokens == 0:
        return projected
    split = _SPLIT if tokens <= _FEW_TOKENS else _LONG_SPLIT
    splits = cdiv(inputs, split)
    shape = (splits, tokens, parts, max_rank)
    shrunk = torch.empty(shape, dtype=torch.float32, device=hidden.device)
    common = _sizes(parts, max_rank, tokens)
    tiles = cdiv(tokens, common["own_rows"])
    shrink_ranks = min(max_rank, _SHRINK_RANKS)
    rank_tiles = cdiv(max_rank, shrink_ranks)
    shrink_kernel[(tiles, parts * rank_tiles, splits)](
        hidden,
        slots,
        adapters.table,
        adapters.table.stride(0),
        shrunk,
        tokens,
        hidden.stride(0),
        inputs=inputs,
        split=split,
        tile_ranks=shrink_ranks,
        depth=_DEPTH,
        num_warps=4,
        num_stages=3,
        **common,
    )
    outputs = projected.shape[1]
    expand_kernel[(tiles, cdiv(outputs, _COLUMNS))](
        shrunk,
        slots,
        adapters.table,
        adapters.table.stride(0),
        projected,
        tokens,
        projected.stride(0),
        outputs=outputs,
        splits=splits,
        tile_ranks=min(max_rank, _EXPAND_RANKS),
        columns=_COLUMNS,
        num_warps=4,
        num_stages=2,
        **common,
    )
    return projected


def _sizes(parts: int, max_rank: int, tokens: int) -> dict[str, int]:
    own_rows = 1 if tokens <= _FEW_TOKENS else _MANY_ROWS
    return {
        "parts": parts,
        "max_rank": max_rank,
        "own_rows": own_rows,
        "tile_rows": max(own_rows, _TILE_ROWS),
    }


def _compiled() -> tuple[Specialisation, ...]:
    forms = []
    shared = {
        "slots": "*i32",
        "table": "*i64",
        "shrunk": "*fp32",
        "tokens": "i32",
        "slot_stride": "i32",
    }
    shared |= {"row_stride": "i32:16"}
    for kind in ("*bf16", "*fp16"):
        for tokens in (_FEW_TOKENS, _FEW_TOKENS + 1):
            for max_rank in (16, 64):
                common = _sizes(3, max_rank, tokens)
                shrink = {"inputs": 4096, "split": _SPLIT, "depth": _DEPTH}
                shrink["tile_ranks"] = min(max_rank, _SHRINK_RANKS)
                forms.append(
                    Specialisation(shrink_kernel, shared | {"hidden": kind}, common | shrink)
                )
                splits = 4 if tokens == _FEW_TOKENS else 1
                expand = {"outputs": 6144, "splits": splits, "columns": _COLUMNS}
                expand["tile_ranks"] = min(max_rank, _EXPAND_RANKS)
                own = shared | {"projected": kind}
                forms.append(Specialisation(expand_kernel, own, common | expand, 4, 2))
    return tuple(forms)


COMPILED = _compiled()
