"""Moving whole blocks of the paged KV cache in Triton, those of all layers in one launch."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from triton import cdiv, jit
from triton import language as tl

from services.engine.core.kernels.blocks import copy_blocks, swap_blocks
from services.engine.core.kernels.triton import why_not
from services.engine.core.kernels.triton.specialisation import Specialisation

# Words of eight bytes: of 128 threads each has eight accesses of 16 bytes under way.
_TILE = 2048
# A bus moves some 50 GB/s with a latency of about 2 us: 100 kB have to be under way, which a few
# multiprocessors see to. The others compute steps meanwhile.
_SWAP_PROGRAMS = 16


@jit
def copy_blocks_kernel(  # type: ignore[no-untyped-def]
    storage,
    scales,
    sources,
    destinations,
    layer_words,
    layer_scale_words,
    words: tl.constexpr,
    scale_words: tl.constexpr,
    tile: tl.constexpr,
):
    """[pairs, layers * 2, tiles of a block]."""
    source = tl.load(sources + tl.program_id(0))
    destination = tl.load(destinations + tl.program_id(0))
    layer = tl.program_id(1).to(tl.int64)
    word = tl.program_id(2) * tile + tl.arange(0, tile)
    own = storage + layer * layer_words
    tl.store(
        own + destination * words + word,
        tl.load(own + source * words + word, word < words),
        word < words,
    )
    if scales is not None:
        # Of which a block has fewer than of elements, hence no more tiles.
        own = scales + layer * layer_scale_words
        tl.store(
            own + destination * scale_words + word,
            tl.load(own + source * scale_words + word, word < scale_words),
            word < scale_words,
        )


@jit
def _swap(  # type: ignore[no-untyped-def]
    there, row, words: tl.constexpr, to_host: tl.constexpr, tile: tl.constexpr
):
    for begin in range(0, words, tile):
        word = begin + tl.arange(0, tile)
        if to_host:
            tl.store(row + word, tl.load(there + word, word < words), word < words)
        else:
            tl.store(there + word, tl.load(row + word, word < words), word < words)


@jit(do_not_specialize=["items"])
def swap_blocks_kernel(  # type: ignore[no-untyped-def]
    storage,
    scales,
    blocks,
    host,
    rows,
    items,
    layers,
    layer_words,
    layer_scale_words,
    row_words,
    words: tl.constexpr,
    scale_words: tl.constexpr,
    to_host: tl.constexpr,
    tile: tl.constexpr,
):
    """Programs take turns at the parts of blocks, `layers` (keys and values apart) of each."""
    for item in range(tl.program_id(0), items, tl.num_programs(0)):
        layer = (item % layers).to(tl.int64)
        block = tl.load(blocks + item // layers)
        row = host + tl.load(rows + item // layers) * row_words
        there = storage + layer * layer_words + block * words
        _swap(there, row + layer * words, words, to_host, tile)
        if scales is not None:
            there = scales + layer * layer_scale_words + block * scale_words
            row += layers * words + layer * scale_words
            _swap(there, row, scale_words, to_host, tile)


@copy_blocks.implementation("cuda", name="triton", unavailable=why_not)
def copy_blocks_triton(
    storage: Tensor, scales: Tensor | None, sources: Tensor, destinations: Tensor
) -> None:
    """All layers in one launch, scales included."""
    parts = _words(storage, scales)
    if parts is None or (len(parts) > 1 and parts[1].shape[2] > parts[0].shape[2]):
        copy_blocks.reference(storage, scales, sources, destinations)
        return
    whole, layers, words = parts[0], parts[0].shape[0], parts[0].shape[2]
    beside = parts[1] if len(parts) > 1 else None
    if len(sources):
        copy_blocks_kernel[(len(sources), layers, cdiv(words, _TILE))](
            whole,
            beside,
            sources,
            destinations,
            whole.stride(0),
            0 if beside is None else beside.stride(0),
            words=words,
            scale_words=0 if beside is None else beside.shape[2],
            tile=_TILE,
            num_warps=4,
        )


@swap_blocks.implementation("cuda", name="triton", unavailable=why_not)
def swap_blocks_triton(
    storage: Tensor,
    scales: Tensor | None,
    blocks: Tensor,
    host: Tensor,
    rows: Tensor,
    *,
    to_host: bool,
) -> None:
    """The kernel itself reads and writes the host's memory."""
    parts = _words(storage, scales)
    if parts is None or host.stride(0) % 8 or host.data_ptr() % 8:
        swap_blocks.reference(storage, scales, blocks, host, rows, to_host=to_host)
        return
    whole, beside = parts[0], parts[1] if len(parts) > 1 else None
    items = len(blocks) * len(whole)
    if items:
        swap_blocks_kernel[(min(items, _SWAP_PROGRAMS),)](
            whole,
            beside,
            blocks,
            host.view(torch.int64),
            rows,
            items,
            len(whole),
            whole.stride(0),
            0 if beside is None else beside.stride(0),
            host.stride(0) // 8,
            words=whole.shape[2],
            scale_words=0 if beside is None else beside.shape[2],
            to_host=to_host,
            tile=_TILE,
            num_warps=4,
        )


def _words(storage: Tensor, scales: Tensor | None) -> tuple[Tensor, ...] | None:
    """[layers * 2, blocks, words of eight bytes], of each part; None where blocks are not whole
    words."""
    given = (storage,) if scales is None else (storage, scales)
    if any(each[0, 0, 0].nbytes % 8 or not each.is_contiguous() for each in given):
        return None
    return tuple(
        each.view(torch.uint8).flatten(0, 1).flatten(2).view(torch.int64) for each in given
    )


def _compiled() -> tuple[Specialisation, ...]:
    words = 16 * 8 * 128 * 2 // 8
    without: dict[str, Any] = {"scales": None, "layer_scale_words": 0}
    indices = {"storage": "*i64", "layer_words": "i64:16"}
    beside = {"scales": "*i64", "layer_scale_words": "i64:16"}
    forms = []
    for with_scales in (False, True):
        pointers = indices | (beside if with_scales else {})
        constants = {"words": words, "scale_words": 64 if with_scales else 0, "tile": _TILE}
        constants |= {} if with_scales else without
        pairs = {"sources": "*i64", "destinations": "*i64"}
        forms.append(Specialisation(copy_blocks_kernel, pointers | pairs, constants))
        numbers = {"items": "i32", "layers": "i32:16", "row_words": "i32:16"}
        swapped = pointers | {"blocks": "*i64", "host": "*i64", "rows": "*i64"} | numbers
        forms += [
            Specialisation(swap_blocks_kernel, swapped, constants | {"to_host": to_host})
            for to_host in (False, True)
        ]
    return tuple(forms)


COMPILED = _compiled()
