"""The forms of the kernels of attention that models use, for every generation of cards."""

from __future__ import annotations

from typing import Any

import torch
from triton import next_power_of_2

from services.engine.core.kernels.triton.attention_call import compute_type
from services.engine.core.kernels.triton.attention_decode import combine_kernel, decode_kernel
from services.engine.core.kernels.triton.attention_extend import extend_kernel
from services.engine.core.kernels.triton.attention_tiles import (
    Card,
    Tiles,
    decode_tiles,
    extend_tiles,
)
from services.engine.core.kernels.triton.specialisation import AMPERE, HOPPER, Specialisation

_CARDS = (Card(AMPERE, 108), Card(HOPPER, 132))
_NAMES = {
    torch.bfloat16: "bf16",
    torch.float16: "fp16",
    torch.float32: "fp32",
    torch.float8_e4m3fn: "fp8e4nv",
    torch.int8: "i8",
}
_PATTERN = {"window": 0, "global_tokens": 0}
_SPARSE = {"window": 4096, "global_tokens": 128}
# Of 4 query heads to a KV head, and blocks of 16 tokens.
_HEADS_PER_KV = 4
_POINTERS = dict.fromkeys(("tables", "starts", "contexts"), "*i32")
_STRIDES = ("query_stride", "query_head_stride", "block_stride", "token_stride", "head_stride")
_SCALES = {"key_scales": "*fp32", "value_scales": "*fp32"}
_SCALE_STRIDES = dict.fromkeys(("scale_block_stride", "scale_token_stride"), "i32")


def _form(
    kernel: Any,
    card: Card,
    tiles: Tiles,
    head_dim: int,
    kv_dtype: torch.dtype,
    numbers: tuple[str, ...],
    pattern: dict[str, int],
    *,
    is_capped: bool = False,
    spills: str = "",
    **constants: int,
) -> Specialisation:
    dtype = torch.float32 if kv_dtype == torch.float32 else torch.bfloat16
    is_bytes = kv_dtype == torch.float8_e4m3fn and not card.converts_fp8
    stored = "*u8" if is_bytes else f"*{_NAMES[kv_dtype]}"
    signature = {
        "queries": f"*{_NAMES[dtype]}",
        "keys": stored,
        "values": stored,
        "output": f"*{_NAMES[dtype]}",
        "scale": "fp32",
        "table_stride": "i32",
        "num_heads": "i32",
        **_POINTERS,
        **dict.fromkeys(_STRIDES, "i32:16"),
        **dict.fromkeys(numbers, "i32"),
    }
    values: dict[str, Any] = {
        "heads_per_kv": _HEADS_PER_KV,
        "head_dim": head_dim,
        "width": next_power_of_2(head_dim),
        "block_size": 16,
        "tile_rows": tiles.rows,
        "tile_tokens": tiles.tokens,
        "far": False,
        "compute": compute_type(dtype, kv_dtype),
        **pattern,
        **constants,
    }
    if kv_dtype == torch.int8:
        signature |= _SCALES | _SCALE_STRIDES
    else:
        values |= dict.fromkeys(_SCALES) | dict.fromkeys(_SCALE_STRIDES, 0)
    if is_capped:
        signature["softcap"] = "fp32"
    else:
        values["softcap"] = None
    return Specialisation(
        kernel, signature, values, tiles.num_warps, tiles.num_stages, card.capability, spills
    )


def _decode(
    card: Card,
    head_dim: int,
    kv_dtype: torch.dtype = torch.bfloat16,
    queries: int = 1,
    pattern: dict[str, int] = _PATTERN,
    **options: Any,
) -> Specialisation:
    tiles = decode_tiles(card, head_dim, kv_dtype, queries * _HEADS_PER_KV)
    numbers = ("num_rows", "row_tiles", "most_queries", "most_splits", "least_tiles")
    form = _form(decode_kernel, card, tiles, head_dim, kv_dtype, numbers, pattern, **options)
    partials = {"partial_outputs": "*fp32", "partial_sums": "*fp32"}
    return Specialisation(
        decode_kernel,
        {**form.signature, **partials},
        form.constants,
        form.num_warps,
        form.num_stages,
        form.since,
        form.spills,
    )


def _extend(
    card: Card,
    head_dim: int,
    kv_dtype: torch.dtype = torch.bfloat16,
    pattern: dict[str, int] = _PATTERN,
    **options: Any,
) -> Specialisation:
    tiles = extend_tiles(card, head_dim, kv_dtype)
    numbers = ("num_sequences", "fewest_queries")
    return _form(
        extend_kernel,
        card,
        tiles,
        head_dim,
        kv_dtype,
        numbers,
        pattern,
        most_sequences=64,
        scores_ahead=tiles.scores_ahead,
        **options,
    )


def _combine(head_dim: int, ceiling: int) -> Specialisation:
    numbers = ("num_heads", "num_rows", "most_queries", "most_splits", "least_tiles")
    signature = {
        "partial_outputs": "*fp32",
        "partial_sums": "*fp32",
        "starts": "*i32",
        "contexts": "*i32",
        "output": "*bf16",
        **dict.fromkeys(numbers, "i32"),
    }
    shape = {"head_dim": head_dim, "width": head_dim, "tile_tokens": 64, "ceiling": ceiling}
    return Specialisation(combine_kernel, signature, shape | _PATTERN)


def _compiled() -> tuple[Specialisation, ...]:
    forms = [_combine(128, 64), _combine(256, 64)]
    slow = "three products for one, where being right is all that counts"
    small = "up to 72 bytes, where scales are many"
    wide = "up to 40 bytes, where smaller tiles would be read more often"
    for card in _CARDS:
        for dtype in (torch.bfloat16, torch.float8_e4m3fn, torch.int8, torch.float32):
            why = {torch.float32: slow, torch.int8: small if card.capability == AMPERE else ""}
            word = "two words of scales, by Triton 3.9" if dtype == torch.int8 else ""
            forms.append(_decode(card, 128, dtype, spills=word))
            forms.append(_extend(card, 128, dtype, spills=why.get(dtype, "")))
        forms.append(_decode(card, 128, queries=16))
        forms.append(_decode(card, 256, pattern=_SPARSE, is_capped=True))
        forms.append(_extend(card, 128, pattern=_SPARSE))
    ampere, hopper = _CARDS
    forms += [_decode(hopper, 64), _extend(hopper, 64), _extend(hopper, 256, spills=wide)]
    return (*forms, _extend(ampere, 256))


COMPILED = _compiled()
