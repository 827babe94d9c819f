"""What lies between the projections and attention, in Triton: one kernel where the reference has
eight, each of which would read and write what the last one wrote.

A program has some heads of one token, all queries, all keys or all values. A head is read once from
device memory: the other half of each pair that is rotated comes from the first-level cache.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from triton import cdiv, jit, next_power_of_2
from triton import language as tl

from services.engine.core.kernels.kv_layer import KVLayer
from services.engine.core.kernels.rotary_kv import rotary_kv
from services.engine.core.kernels.triton import why_not
from services.engine.core.kernels.triton.language import (
    float8_bits,
    round_to_integers,
    rounded,
    wait_for_earlier,
)
from services.engine.core.kernels.triton.serving import (
    FLOATS,
    as_bytes,
    begins_early,
    converts_fp8,
    early_forms,
)
from services.engine.core.kernels.triton.specialisation import Specialisation

# Eight heads of 128 are eight elements for each of 128 threads.
_MOST_HEADS = 8
_FORMATS = FLOATS | {torch.int8, torch.float8_e4m3fn}


@jit
def _kept(values, divisor, dtype: tl.constexpr, converts_fp8: tl.constexpr):  # type: ignore[no-untyped-def]
    """float32 as a cache of `dtype` keeps it; see `quantize_heads`."""
    if dtype == tl.int8:
        result = round_to_integers(tl.div_rn(values, divisor)).to(tl.int8)
    elif dtype == tl.uint8:
        result = float8_bits(values, converts_fp8)
    else:
        result = rounded(values, dtype)
    return result


@jit
def _gained(values, inverse, gains, inside, dtype: tl.constexpr):  # type: ignore[no-untyped-def]
    """The last part of an RMSNorm, rounded as if it had been stored."""
    gain = tl.load(gains, inside, other=0.0).to(tl.float32)
    return rounded(values * inverse * gain, dtype).to(tl.float32)


@jit
def _write_heads(  # type: ignore[no-untyped-def]
    begin,
    inside,
    there,
    scales,
    scale_place,
    norm,
    cos,
    sin,
    eps,
    head_dim: tl.constexpr,
    rotary_dim: tl.constexpr,
    tile_heads: tl.constexpr,
    tile_pairs: tl.constexpr,
    tile_rest: tl.constexpr,
    converts_fp8: tl.constexpr,
):
    """Norm, rotate and keep heads that begin at `begin`, at `there`, and their scales at
    `scale_place` of `scales`; all [heads].

    What is rotated is [heads, 2, pairs], the first halves and the second; the rest [heads, rest].
    What heads share is loaded for each of them, from the first-level cache: for one alone, and
    handed to the threads of the others, it would wait for barriers.
    """
    dtype: tl.constexpr = begin.dtype.element_ty
    kind: tl.constexpr = there.dtype.element_ty
    squares = tl.zeros((tile_heads,), tl.float32)
    largest = tl.zeros((tile_heads,), tl.float32)
    if rotary_dim > 0:
        half: tl.constexpr = rotary_dim // 2
        side = tl.arange(0, 2)[None, :, None]
        pair = tl.arange(0, tile_pairs)[None, None, :]
        turning = inside[:, None, None] & (pair < half)
        own = tl.broadcast_to(side * half + pair, (tile_heads, 2, tile_pairs))
        other = tl.broadcast_to((1 - side) * half + pair, (tile_heads, 2, tile_pairs))
        heads = begin[:, None, None]
        values = tl.load(heads + own, turning, other=0.0).to(tl.float32)
        opposite = tl.load(heads + other, turning, other=0.0).to(tl.float32)
        squares += tl.sum(tl.sum(values * values, 2), 1)
    if rotary_dim < head_dim:
        place = rotary_dim + tl.arange(0, tile_rest)[None, :]
        staying = inside[:, None] & (place < head_dim)
        rest = tl.load(begin[:, None] + place, staying, other=0.0).to(tl.float32)
        squares += tl.sum(rest * rest, 1)
    if norm is not None:
        inverse = tl.rsqrt(squares / head_dim + eps)
        if rotary_dim > 0:
            each = inverse[:, None, None]
            values = _gained(values, each, norm + own, turning, dtype)
            opposite = _gained(opposite, each, norm + other, turning, dtype)
        if rotary_dim < head_dim:
            rest = _gained(rest, inverse[:, None], norm + place, staying, dtype)
    if rotary_dim > 0:
        cosines = tl.load(cos + own, turning, other=0.0).to(tl.float32)
        sines = tl.load(sin + own, turning, other=0.0).to(tl.float32)
        values = rounded(values * cosines + opposite * sines, dtype).to(tl.float32)
    if scales is not None:
        if rotary_dim > 0:
            largest = tl.maximum(largest, tl.max(tl.max(tl.abs(values), 2), 1))
        if rotary_dim < head_dim:
            largest = tl.maximum(largest, tl.max(tl.abs(rest), 1))
        scale = largest / 127.0
        tl.store(scales + scale_place, scale, inside)
        largest = tl.where(scale > 0, scale, 1.0)
    if rotary_dim > 0:
        kept = _kept(values, largest[:, None, None], kind, converts_fp8)
        tl.store(there[:, None, None] + own, kept, turning)
    if rotary_dim < head_dim:
        kept = _kept(rest, largest[:, None], kind, converts_fp8)
        tl.store(there[:, None] + place, kept, staying)


@jit
def rotary_kv_kernel(  # type: ignore[no-untyped-def]
    qkv,
    queries,
    keys,
    values,
    key_scales,
    value_scales,
    slots,
    query_norm,
    key_norm,
    cos,
    sin,
    row_stride,
    block_stride,
    slot_stride,
    head_stride,
    scale_block_stride,
    scale_slot_stride,
    eps,
    heads: tl.constexpr,
    kv_heads: tl.constexpr,
    block_size: tl.constexpr,
    head_dim: tl.constexpr,
    rotary_dim: tl.constexpr,
    tile_heads: tl.constexpr,
    tile_dim: tl.constexpr,
    tile_pairs: tl.constexpr,
    tile_rest: tl.constexpr,
    converts_fp8: tl.constexpr,
    is_early: tl.constexpr,
):
    """Some heads of a token: [tokens, tiles of queries, of keys and of values]."""
    wait_for_earlier(is_early)
    token = tl.program_id(0).to(tl.int64)
    part = tl.program_id(1)
    query_parts: tl.constexpr = (heads + tile_heads - 1) // tile_heads
    kv_parts: tl.constexpr = (kv_heads + tile_heads - 1) // tile_heads
    own = tl.arange(0, tile_heads)
    row = qkv + token * row_stride
    if rotary_dim > 0:
        cos += token * rotary_dim
        sin += token * rotary_dim
    if part < query_parts:
        head = part * tile_heads + own
        there = queries + (token * heads + head) * head_dim
        _write_heads(
            row + head * head_dim,
            head < heads,
            there,
            None,
            head,
            query_norm,
            cos,
            sin,
            eps,
            head_dim,
            rotary_dim,
            tile_heads,
            tile_pairs,
            tile_rest,
            converts_fp8,
        )
    else:
        slot = tl.load(slots + token)
        block = slot // block_size
        offset = slot % block_size
        place = block * block_stride + offset * slot_stride
        scale_place = block * scale_block_stride + offset * scale_slot_stride
        if part < query_parts + kv_parts:
            head = (part - query_parts) * tile_heads + own
            _write_heads(
                row + (heads + head) * head_dim,
                head < kv_heads,
                keys + place + head.to(tl.int64) * head_stride,
                key_scales,
                scale_place + head,
                key_norm,
                cos,
                sin,
                eps,
                head_dim,
                rotary_dim,
                tile_heads,
                tile_pairs,
                tile_rest,
                converts_fp8,
            )
        else:
            head = (part - query_parts - kv_parts) * tile_heads + own
            _write_heads(
                row + (heads + kv_heads + head) * head_dim,
                head < kv_heads,
                values + place + head.to(tl.int64) * head_stride,
                value_scales,
                scale_place + head,
                None,
                cos,
                sin,
                eps,
                head_dim,
                0,
                tile_heads,
                1,
                tile_dim,
                converts_fp8,
            )


@rotary_kv.implementation("cuda", name="triton", unavailable=why_not)
def rotary_kv_triton(
    qkv: Tensor,
    cache: KVLayer,
    slots: Tensor,
    norms: tuple[Tensor, Tensor] | None,
    eps: float,
    angles: tuple[Tensor, Tensor] | None,
) -> Tensor:
    """qkv may have any stride between rows, the cache any between blocks, slots and heads."""
    if not _is_served(qkv, cache, norms, angles):
        return rotary_kv.reference(qkv, cache, slots, norms, eps, angles)
    keys, scales = cache.keys, cache.key_scales
    _, block_size, kv_heads, head_dim = keys.shape
    num_tokens = len(qkv)
    heads = qkv.shape[1] // head_dim - 2 * kv_heads
    rotary_dim = 0 if angles is None else angles[0].shape[-1]
    queries = torch.empty((num_tokens, heads, head_dim), dtype=qkv.dtype, device=qkv.device)
    shape = _tiles(heads, kv_heads, head_dim, rotary_dim)
    tile_heads = shape["tile_heads"]
    query_norm, key_norm = (None, None) if norms is None else norms
    cos, sin = (None, None) if angles is None else angles
    if num_tokens:
        parts = cdiv(heads, tile_heads) + 2 * cdiv(kv_heads, tile_heads)
        rotary_kv_kernel[(num_tokens, parts)](
            qkv,
            queries,
            as_bytes(keys),
            as_bytes(cache.values),
            scales,
            cache.value_scales,
            slots,
            query_norm,
            key_norm,
            cos,
            sin,
            qkv.stride(0),
            keys.stride(0),
            keys.stride(1),
            keys.stride(2),
            0 if scales is None else scales.stride(0),
            0 if scales is None else scales.stride(1),
            eps,
            block_size=block_size,
            converts_fp8=converts_fp8(qkv.device),
            num_warps=4,
            **shape,
            **begins_early(qkv.device),
        )
    return queries


def _tiles(heads: int, kv_heads: int, head_dim: int, rotary_dim: int) -> dict[str, int]:
    """The sizes of what a program computes: of a head, and of its parts."""
    return {
        "heads": heads,
        "kv_heads": kv_heads,
        "head_dim": head_dim,
        "rotary_dim": rotary_dim,
        "tile_heads": min(_MOST_HEADS, next_power_of_2(kv_heads)),
        "tile_dim": next_power_of_2(head_dim),
        "tile_pairs": next_power_of_2(max(1, rotary_dim // 2)),
        "tile_rest": next_power_of_2(max(1, head_dim - rotary_dim)),
    }


def _is_served(
    qkv: Tensor,
    cache: KVLayer,
    norms: tuple[Tensor, Tensor] | None,
    angles: tuple[Tensor, Tensor] | None,
) -> bool:
    dense = (*(norms or ()), *(angles or ()))
    same_places = [(cache.keys, cache.values)]
    if cache.key_scales is not None and cache.value_scales is not None:
        same_places.append((cache.key_scales, cache.value_scales))
    return (
        qkv.dtype in FLOATS
        and qkv.stride(1) == 1
        and cache.keys.dtype in _FORMATS
        and all(each.is_contiguous() and each.dtype in FLOATS for each in dense)
        and all(
            keys.stride() == values.stride() and keys.stride(-1) == 1
            for keys, values in same_places
        )
    )


def _compiled() -> tuple[Specialisation, ...]:
    pointers = ("qkv", "queries", "query_norm", "key_norm", "cos", "sin")
    strides = ("row_stride", "block_stride", "slot_stride", "head_stride")
    without_scales = {
        "key_scales": None,
        "value_scales": None,
        "scale_block_stride": 0,
        "scale_slot_stride": 0,
    }
    scaled = {
        "key_scales": "*fp32",
        "value_scales": "*fp32",
        "scale_block_stride": "i32",
        "scale_slot_stride": "i32",
    }
    unnormed: dict[str, Any] = {"query_norm": None, "key_norm": None}
    unrotated: dict[str, Any] = {"cos": None, "sin": None}
    forms = []
    for heads, kv_heads, head_dim, rotary_dim, has_norms in (
        (32, 8, 128, 128, False),  # Llama 3.1, Mistral
        (16, 8, 128, 128, True),  # Qwen3
        (8, 4, 256, 256, True),  # Gemma 3
        (32, 32, 96, 72, False),  # Phi-3, rotated in part
        (12, 12, 64, 0, False),  # GPT-2
    ):
        signature = dict.fromkeys(pointers, "*bf16") | dict.fromkeys(strides, "i32:16")
        signature |= {"slots": "*i64", "eps": "fp32"}
        constants = {"block_size": 16, **_tiles(heads, kv_heads, head_dim, rotary_dim)}
        constants |= {} if has_norms else unnormed
        constants |= {} if rotary_dim else unrotated
        for kind, since in (("*bf16", 80), ("*u8", 80), ("*u8", 89), ("*i8", 80)):
            kept = {"keys": kind, "values": kind}
            forms.append(
                Specialisation(
                    rotary_kv_kernel,
                    {
                        name: each
                        for name, each in (signature | kept).items()
                        if name not in constants
                    }
                    | (scaled if kind == "*i8" else {}),
                    constants
                    | {"converts_fp8": since == 89}
                    | ({} if kind == "*i8" else without_scales),
                    since=since,
                )
            )
    return tuple(forms)


COMPILED = early_forms(_compiled())
