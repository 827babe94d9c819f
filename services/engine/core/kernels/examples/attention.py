"""The paged cache: written to, attended to, copied."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from services.engine.core.kernels.attention import AttentionMetadata
from services.engine.core.kernels.examples.base import EPS, Example, Maker, examples_of
from services.engine.core.kernels.kv_layer import KVLayer, quantize_heads

_BLOCK_SIZE = 16


def _cache(make: Maker, num_blocks: int, head_dim: int, dtype: torch.dtype) -> KVLayer:
    """A cache whose blocks hold numbers, as they would after many steps."""
    shape = (num_blocks, _BLOCK_SIZE, make.sizes.kv_heads, head_dim)
    parts, scales = [], []
    for _ in range(2):
        heads = make.normal(*shape).flatten(0, 1)
        stored, own_scales = quantize_heads(heads, dtype)
        parts.append(stored.view(shape))
        scales.append(None if own_scales is None else own_scales.view(shape[:-1]))
    return KVLayer(*parts, *scales)


_CACHE_DTYPES = (torch.bfloat16, torch.float8_e4m3fn, torch.int8)


@examples_of("write_kv")
def _write_kv(make: Maker) -> Iterator[Example]:
    for head_dim in make.sizes.head_dims:
        for dtype in _CACHE_DTYPES:
            for tokens in make.sizes.tokens:
                cache = _cache(make, -(-2 * tokens // _BLOCK_SIZE), head_dim, dtype)
                slots = make.order(cache.keys.shape[0] * _BLOCK_SIZE)[:tokens].contiguous()
                keys, values = (
                    make.normal(tokens, make.sizes.kv_heads, head_dim) for _ in range(2)
                )
                written = tuple(
                    each
                    for each in (cache.keys, cache.values, cache.key_scales, cache.value_scales)
                    if each is not None
                )
                what = f"{tokens} tokens of {head_dim} in {dtype}"
                yield Example(what, (keys, values, cache, slots), written=written)


@examples_of("rotary_kv")
def _rotary_kv(make: Maker) -> Iterator[Example]:
    for example in _write_kv(make):
        keys, values, cache, slots = example.args
        tokens, _, head_dim = keys.shape
        queries = make.normal(tokens, make.sizes.heads, head_dim)
        qkv = torch.cat((queries, keys, values), 1).flatten(1)
        angles = make.normal(tokens, 1, head_dim // 2, dtype=torch.float32)
        cos = torch.cat((angles.cos(), angles.cos()), -1).to(qkv.dtype)
        sin = torch.cat((-angles.sin(), angles.sin()), -1).to(qkv.dtype)
        norms = make.normal(head_dim), make.normal(head_dim)
        for what, own in (("plain", None), ("with norms", norms)):
            args = qkv, cache, slots, own, EPS, (cos, sin)
            yield Example(f"{example.what}, {what}", args, written=example.written)


@examples_of("paged_attention")
def _paged_attention(make: Maker) -> Iterator[Example]:
    options: tuple[dict[str, Any], ...] = (
        {},
        {"window": make.sizes.window, "softcap": 30.0},
        {"window": make.sizes.window, "global_tokens": 4},
    )
    for head_dim in make.sizes.head_dims:
        for step in make.sizes.steps:
            for dtype in _CACHE_DTYPES:
                for chosen in options if dtype == torch.bfloat16 else options[:1]:
                    yield _attention_step(make, step, head_dim, dtype, chosen)


def _attention_step(
    make: Maker,
    step: tuple[tuple[int, int], ...],
    head_dim: int,
    dtype: torch.dtype,
    options: dict[str, Any],
) -> Example:
    lengths = [-(-context // _BLOCK_SIZE) for _, context in step]
    order = make.order(sum(lengths))
    tables = torch.zeros(len(step), max(lengths), dtype=torch.int32, device=make.device)
    start = 0
    for row, length in enumerate(lengths):
        tables[row, :length] = order[start : start + length]
        start += length
    metadata = AttentionMetadata(
        tuple(query for query, _ in step),
        tuple(context for _, context in step),
        tables,
        _BLOCK_SIZE,
    )
    tokens = sum(metadata.query_lengths)
    queries = make.normal(tokens, make.sizes.heads, head_dim)
    args = queries, _cache(make, len(order), head_dim, dtype), metadata, head_dim**-0.5
    what = f"{len(step)} sequences, {tokens} tokens of {head_dim} over {dtype} {options or ''}"
    return Example(what, args, options)


def _storage(make: Maker, dtype: torch.dtype) -> tuple[Tensor, Tensor | None]:
    """What three layers keep in eleven blocks, and its scales."""
    shape = (3, 2, 11, _BLOCK_SIZE, make.sizes.kv_heads, make.sizes.head_dims[0])
    elements, scales = quantize_heads(make.normal(*shape), dtype)
    return elements, scales


@examples_of("copy_blocks")
def _copy_blocks(make: Maker) -> Iterator[Example]:
    for dtype in _CACHE_DTYPES:
        storage, scales = _storage(make, dtype)
        sources, destinations = make.order(11)[:10].chunk(2)
        written = (storage,) if scales is None else (storage, scales)
        args = storage, scales, sources, destinations
        yield Example(f"{dtype}", args, written=written)


@examples_of("swap_blocks")
def _swap_blocks(make: Maker) -> Iterator[Example]:
    for dtype in _CACHE_DTYPES:
        storage, scales = _storage(make, dtype)
        kept = (storage,) if scales is None else (storage, scales)
        row_bytes = sum(each[:, :, 0].nbytes for each in kept)
        host = make.integers(7, row_bytes, below=256).to(torch.uint8).cpu()
        if make.device.type == "cuda":
            host = host.pin_memory()
        args = storage, scales, make.order(11)[:5], host, make.order(7)[:5]
        yield Example(f"{dtype} out", args, {"to_host": True}, written=(host,))
        host = host % 64  # such bytes are numbers in all formats
        if make.device.type == "cuda":
            host = host.pin_memory()
        args = *args[:3], host, args[4]
        yield Example(f"{dtype} in", args, {"to_host": False}, written=kept)
