"""Low-rank adapters in Triton: a pair of kernels for all adapters of a step, which read on the
device which token has which (Chen et al., arXiv:2310.18547; Sheng et al., arXiv:2311.03285).

`shrink` multiplies a token's input by its adapter's `down`, `expand` the result by `up`, and adds
it to the projection. What was merged in the projection (q, k and v, gate and up) is computed by the
same two launches. A program has some tokens, those of the same adapter next to each other, and does
the adapters that it finds among them one after another: of a prompt's tokens all have one, and of
few tokens each program has one. Where nobody has any, it reads that and ends. Adapters lie anywhere
in memory: a table on the device says where.

What a step with adapters takes beside one without: two launches for each projection, eight a layer,
and one to put tokens together; and in a gated feed-forward layer the fusion of its activation. Of
memory each adapter's matrices are read once a step: of rank 16 of all projections of an 8B model
84 MB, 0.5 % of its weights in bf16. What lies between the two kernels stays in the L2 cache: 64
tokens of 4,096 inputs and three parts of rank 64 leave 192 KiB. So what a step of few tokens takes
more should be launches above all, 289 in an 8B model: of some 2 us each, a tenth of such a step.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from triton import cdiv, jit, next_power_of_2
from triton import language as tl

from services.engine.core.kernels.low_rank import (
    SlottedParts,
    add_low_ranks,
    group_by_adapter,
)
from services.engine.core.kernels.triton import why_not
from services.engine.core.kernels.triton.language import dot, rounded, wait_for_earlier
from services.engine.core.kernels.triton.serving import FLOATS, begins_early, early_forms
from services.engine.core.kernels.triton.specialisation import Specialisation

# The matrix units take no fewer rows.
_TILE_ROWS = 16
_DEPTH = 128
_COLUMNS = 128
_SHRINK_RANKS = 64
_EXPAND_RANKS = 32
_GROUP_TILE = 16
_GROUP_CHUNK = 128


@dataclass(frozen=True, slots=True)
class _Division:
    """How the tokens of a step and what is done to them are divided among programs.

    Attributes:
        most_tokens: of the steps that it is for.
        shrunk_rows, expanded_rows: tokens of a program. `shrink` has few programs, and with one
            token each they read `down` from the L2 cache as often as there are tokens; `expand` has
            one for each tile of outputs, 224 for 28,672.
        split: inputs that one program of `shrink` goes through: rank 16 of 4,096 is 128 kB, too
            much for one multiprocessor to read in good time.
    """

    most_tokens: int
    shrunk_rows: int
    expanded_rows: int
    split: int


_DIVISIONS = (
    _Division(8, 1, 1, 1024),
    _Division(64, 1, 4, 1024),
    _Division(512, 16, 16, 1024),
    _Division(2048, 64, 64, 1024),
)
_OF_MANY = _Division(1 << 31, 64, 64, 8192)


@jit(do_not_specialize=["tokens"])
def group_by_adapter_kernel(slots, grouped, tokens, tile: tl.constexpr, chunk: tl.constexpr):  # type: ignore[no-untyped-def]
    """A tile of tokens: the place of each is the number of those that come before it.

    It lets no kernel begin early, so that all that come after it may read what it has written
    before they wait for others.
    """
    token = tl.program_id(0) * tile + tl.arange(0, tile)
    is_own = token < tokens
    slot = tl.load(slots + token, is_own, other=-1)
    key = tl.where(slot < 0, 0x7FFFFFFF, slot)
    place = tl.zeros((tile,), tl.int32)
    for start in range(0, tokens, chunk):
        other = start + tl.arange(0, chunk)
        others = tl.load(slots + other, other < tokens, other=-1)
        others = tl.where(others < 0, 0x7FFFFFFF, others)
        is_before = (others[None, :] == key[:, None]) & (other[None, :] < token[:, None])
        is_before |= others[None, :] < key[:, None]
        place += tl.sum(is_before.to(tl.int32), 1)
    tl.store(grouped + place, token, is_own)
    tl.store(grouped + tokens + place, slot, is_own)


@jit
def _own_of(grouped, tokens, own_rows: tl.constexpr, tile_rows: tl.constexpr):  # type: ignore[no-untyped-def]
    """The tokens of this program, and the slots of their adapters."""
    own = tl.arange(0, tile_rows)
    place = tl.program_id(0) * own_rows + own
    is_own = (own < own_rows) & (place < tokens)
    row = tl.load(grouped + place, is_own, other=0).to(tl.int64)
    return row, tl.load(grouped + tokens + place, is_own, other=-1)


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
    grouped,
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
    is_early: tl.constexpr,
):
    """shrunk[split, token, part] = input * down^T, over this split of the inputs: [tiles of tokens,
    parts and tiles of ranks, splits]."""
    wait_for_earlier(is_early)
    row, slot_of = _own_of(grouped, tokens, own_rows, tile_rows)
    wide: tl.constexpr = (max_rank + tile_ranks - 1) // tile_ranks
    part = tl.program_id(1) // wide
    rank_of = tl.program_id(1) % wide * tile_ranks + tl.arange(0, tile_ranks)
    begin = tl.program_id(2) * split
    dtype: tl.constexpr = hidden.dtype.element_ty
    slot = tl.max(slot_of, 0)
    while slot >= 0:
        down, _, rank, _, _ = _part_of(table, slot, slot_stride, part, dtype)
        inside = slot_of == slot
        if tl.program_id(1) % wide * tile_ranks < rank:
            summed = tl.zeros((tile_rows, tile_ranks), tl.float32)
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
                inside[:, None] & (rank_of < rank)[None, :],
            )
        slot = tl.max(tl.where(slot_of < slot, slot_of, -1), 0)


@jit(do_not_specialize=["tokens", "slot_stride"])
def expand_kernel(  # type: ignore[no-untyped-def]
    shrunk,
    grouped,
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
    is_early: tl.constexpr,
):
    """projected += (the sum of the splits) * up^T: [tiles of tokens, tiles of outputs]."""
    # What is read ahead of the wait was there before any kernel since has begun.
    row, slot_of = _own_of(grouped, tokens, own_rows, tile_rows)
    wait_for_earlier(is_early)
    column = tl.program_id(1) * columns + tl.arange(0, columns)
    dtype: tl.constexpr = projected.dtype.element_ty
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


@group_by_adapter.implementation("cuda", name="triton", unavailable=why_not)
def group_by_adapter_triton(slots: Tensor) -> Tensor:
    """slots: contiguous. In one launch, where sorting takes several: tokens are compared with each
    other, 64 million pairs of 8,192."""
    tokens = len(slots)
    if slots.dtype != torch.int32 or not slots.is_contiguous() or tokens == 0:
        return group_by_adapter.reference(slots)
    grouped = torch.empty((2, tokens), dtype=torch.int32, device=slots.device)
    group_by_adapter_kernel[(cdiv(tokens, _GROUP_TILE),)](
        slots,
        grouped,
        tokens,
        tile=_GROUP_TILE,
        chunk=_GROUP_CHUNK,
        num_warps=4,
    )
    return grouped


@add_low_ranks.implementation("cuda", name="triton", unavailable=why_not)
def add_low_ranks_triton(
    projected: Tensor, hidden: Tensor, grouped: Tensor, adapters: SlottedParts
) -> Tensor:
    """projected and hidden may have any stride between rows."""
    if (
        projected.dtype not in FLOATS
        or hidden.dtype != projected.dtype
        or projected.stride(1) != 1
        or hidden.stride(1) != 1
    ):
        return add_low_ranks.reference(projected, hidden, grouped, adapters)
    (tokens, inputs), outputs = hidden.shape, projected.shape[1]
    if tokens == 0:
        return projected
    division = _division(tokens)
    table = adapters.table
    parts, max_rank = table.shape[1], next_power_of_2(adapters.max_rank)
    splits = cdiv(inputs, division.split)
    shape = (splits, tokens, parts, max_rank)
    shrunk = torch.empty(shape, dtype=torch.float32, device=hidden.device)
    is_wide = hidden.dtype == torch.float32
    shrink = _shrink_constants(division, parts, max_rank, is_wide=is_wide)
    early = begins_early(hidden.device)
    tiles = cdiv(tokens, division.shrunk_rows)
    shrink_kernel[(tiles, parts * cdiv(max_rank, shrink["tile_ranks"]), splits)](
        hidden,
        grouped,
        table,
        table.stride(0),
        shrunk,
        tokens,
        hidden.stride(0),
        inputs=inputs,
        num_warps=_warps(division.shrunk_rows),
        num_stages=3,
        **shrink,
        **early,
    )
    tiles = cdiv(tokens, division.expanded_rows)
    expand_kernel[(tiles, cdiv(outputs, _COLUMNS))](
        shrunk,
        grouped,
        table,
        table.stride(0),
        projected,
        tokens,
        projected.stride(0),
        outputs=outputs,
        splits=splits,
        num_warps=_warps(division.expanded_rows),
        num_stages=2,
        **_expand_constants(division, parts, max_rank, is_wide=is_wide),
        **early,
    )
    return projected


def _division(tokens: int) -> _Division:
    return next((each for each in _DIVISIONS if tokens <= each.most_tokens), _OF_MANY)


def _warps(rows: int) -> int:
    return 8 if rows == 64 else 4


def _shrink_constants(
    division: _Division, parts: int, max_rank: int, *, is_wide: bool
) -> dict[str, int]:
    """is_wide: of float32, whose product takes three of TF32 and the registers for them."""
    return {
        "parts": parts,
        "max_rank": max_rank,
        "split": division.split,
        "own_rows": division.shrunk_rows,
        "tile_rows": max(division.shrunk_rows, _TILE_ROWS),
        "tile_ranks": min(max_rank, _SHRINK_RANKS),
        "depth": _DEPTH // 4 if is_wide else _DEPTH,
    }


def _expand_constants(
    division: _Division, parts: int, max_rank: int, *, is_wide: bool
) -> dict[str, int]:
    return {
        "parts": parts,
        "max_rank": max_rank,
        "own_rows": division.expanded_rows,
        "tile_rows": max(division.expanded_rows, _TILE_ROWS),
        "tile_ranks": min(max_rank, _EXPAND_RANKS // 2 if is_wide else _EXPAND_RANKS),
        "columns": _COLUMNS,
    }


def _pair(
    kind: str, division: _Division, parts: int, inputs: int, outputs: int, max_rank: int
) -> tuple[Specialisation, Specialisation]:
    shared = {"grouped": "*i32", "table": "*i64", "shrunk": "*fp32", "tokens": "i32"}
    shared |= {"row_stride": "i32:16", "slot_stride": "i32"}
    is_wide = kind == "*fp32"
    shrink = _shrink_constants(division, parts, max_rank, is_wide=is_wide) | {"inputs": inputs}
    expand = _expand_constants(division, parts, max_rank, is_wide=is_wide) | {"outputs": outputs}
    expand["splits"] = cdiv(inputs, division.split)
    return (
        Specialisation(
            shrink_kernel, shared | {"hidden": kind}, shrink, _warps(division.shrunk_rows), 3
        ),
        Specialisation(
            expand_kernel, shared | {"projected": kind}, expand, _warps(division.expanded_rows), 2
        ),
    )


def _compiled() -> tuple[Specialisation, ...]:
    few, *_, middle, _many = _DIVISIONS
    grouping = Specialisation(
        group_by_adapter_kernel,
        {"slots": "*i32", "grouped": "*i32", "tokens": "i32"},
        {"tile": _GROUP_TILE, "chunk": _GROUP_CHUNK},
    )
    pairs = early_forms(
        (
            # The projections of an 8B model, for every number of tokens, by the rank that is served
            # unless settings say otherwise.
            *(
                form
                for division in (*_DIVISIONS, _OF_MANY)
                for form in _pair("*bf16", division, 3, 4096, 6144, 64)
            ),
            *_pair("*bf16", few, 2, 4096, 28672, 16),
            *_pair("*bf16", middle, 1, 14336, 4096, 256),
            *_pair("*fp16", few, 2, 4096, 28672, 64),
            *_pair("*fp32", middle, 2, 1024, 4096, 64),
            *_pair("*fp32", _OF_MANY, 2, 1024, 4096, 64),
        )
    )
    return grouping, *pairs


COMPILED = _compiled()
