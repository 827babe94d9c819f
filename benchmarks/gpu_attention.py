"""Attention over the paged cache: decoding by bandwidth, prompts by the matrix units."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from benchmarks.gpu_bench import Bench, implementations
from services.engine.core.kernels import AttentionMetadata, KVLayer, paged_attention
from services.engine.core.kernels.registry import REFERENCE

BLOCK_SIZE = 16
# Of Llama 3.1 8B.
HEADS, KV_HEADS, HEAD_DIM = 32, 8, 128
BATCHES, CONTEXTS = (1, 8, 64, 256), (1024, 8192, 32768)
PROMPTS = (2048, 8192)
KV_DTYPES = {"bf16": torch.bfloat16, "fp8": torch.float8_e4m3fn, "int8": torch.int8}
# The largest cache that is made, and the longest one that goes through the reference, in tokens.
_MOST_BYTES, _REFERENCE_TOKENS = 24 << 30, 1 << 17


def decode_attention(bench: Bench) -> None:
    """One query for each sequence: the time to read its keys and values."""
    batches, contexts = ((1, 3), (40,)) if bench.tiny else (BATCHES, CONTEXTS)
    # The case of the goal first.
    for context in sorted(contexts, key=lambda each: each != 8192):
        for batch in batches:
            for kv, dtype in KV_DTYPES.items():
                _decode(bench, batch, context, kv, dtype)


def _decode(bench: Bench, batch: int, context: int, kv: str, dtype: torch.dtype) -> None:
    tokens = batch * context
    num_bytes = 2.0 * tokens * KV_HEADS * (HEAD_DIM * dtype.itemsize + 4 * (kv == "int8"))
    if num_bytes > _MOST_BYTES or bench.left_s <= 0:
        return
    cache = make_cache(batch * -(-context // BLOCK_SIZE), dtype, bench.device)
    metadata = make_metadata([1] * batch, [context] * batch, bench.device)
    queries = torch.randn(batch, HEADS, HEAD_DIM, device=bench.device).bfloat16()
    case = f"decode, batch {batch}, context {context}, {kv} KV"
    for name, run in implementations(paged_attention).items():
        if name != REFERENCE or tokens <= _REFERENCE_TOKENS:
            call = _call(run, queries, cache, metadata)
            bench.measure(case, name, call, num_bytes=num_bytes)
    if dtype == torch.bfloat16:
        # What SDPA is given lies together: it has no tables to look up.
        shape = (batch, context, KV_HEADS, HEAD_DIM)
        keys, values = (
            each.flatten(0, 1)[:tokens].view(shape) for each in (cache.keys, cache.values)
        )
        _yardsticks(bench, case, queries.unsqueeze(1), keys, values, num_bytes=num_bytes)


def prefill_attention(bench: Bench) -> None:
    """Prompts, whole and in chunks that see what came before."""
    steps: list[tuple[str, list[int], list[int]]] = []
    for length in (48,) if bench.tiny else PROMPTS:
        steps.append((f"a prompt of {length}", [length], [length]))
        chunk = length // 4
        steps.append((f"a chunk of {chunk} that ends a prompt of {length}", [chunk], [length]))
    for case, queries_lengths, contexts in steps:
        for kv, dtype in KV_DTYPES.items():
            tokens = sum(queries_lengths)
            cache = make_cache(-(-sum(contexts) // BLOCK_SIZE), dtype, bench.device)
            metadata = make_metadata(queries_lengths, contexts, bench.device)
            queries = torch.randn(tokens, HEADS, HEAD_DIM, device=bench.device).bfloat16()
            seen = sum(
                query * (2 * context - query + 1) / 2
                for query, context in zip(queries_lengths, contexts, strict=True)
            )
            flops = 4.0 * HEADS * HEAD_DIM * seen
            for name, run in implementations(paged_attention).items():
                call = _call(run, queries, cache, metadata)
                bench.measure(f"{case}, {kv} KV", name, call, flops=flops)
            if dtype == torch.bfloat16 and queries_lengths == contexts:
                shape = (1, tokens, KV_HEADS, HEAD_DIM)
                keys, values = (
                    each.flatten(0, 1)[:tokens].view(shape) for each in (cache.keys, cache.values)
                )
                _yardsticks(
                    bench, f"{case}, {kv} KV", queries.unsqueeze(0), keys, values, flops=flops
                )


def make_cache(num_blocks: int, dtype: torch.dtype, device: torch.device) -> KVLayer:
    """A cache of one layer that is full of numbers."""
    shape = (num_blocks, BLOCK_SIZE, KV_HEADS, HEAD_DIM)
    parts, scales = [], []
    for _ in range(2):
        stored = torch.empty(shape, dtype=dtype, device=device)
        if dtype == torch.bfloat16:
            stored.normal_()
        elif dtype == torch.int8:
            stored.random_(-127, 127)
            scales.append(torch.full(shape[:-1], 0.01, device=device))
        else:
            # Any byte but those that are NaN.
            stored.view(torch.uint8).random_(0, 0x70)
        parts.append(stored)
    return KVLayer(*parts, *scales)


def make_metadata(
    queries: list[int], contexts: list[int], device: torch.device
) -> AttentionMetadata:
    """A step whose sequences have blocks all over the cache."""
    lengths = [-(-context // BLOCK_SIZE) for context in contexts]
    order = torch.randperm(sum(lengths)).int()
    tables = torch.zeros(len(lengths), max(lengths), dtype=torch.int32)
    start = 0
    for row, length in enumerate(lengths):
        tables[row, :length] = order[start : start + length]
        start += length
    return AttentionMetadata(tuple(queries), tuple(contexts), tables.to(device), BLOCK_SIZE)


def _call(
    run: Callable[..., Tensor], queries: Tensor, cache: KVLayer, metadata: AttentionMetadata
) -> Callable[[], Tensor]:
    # The lengths are brought to the device once in a step, not once in a layer.
    _ = metadata.device_lengths
    return lambda: run(queries, cache, metadata, HEAD_DIM**-0.5)


def _yardsticks(
    bench: Bench,
    case: str,
    queries: Tensor,
    keys: Tensor,
    values: Tensor,
    *,
    num_bytes: float = 0.0,
    flops: float = 0.0,
) -> None:
    """The same by others, from keys and values that lie together: [batch, tokens, heads, dim]."""
    heads, key_heads, value_heads = (each.transpose(1, 2) for each in (queries, keys, values))
    is_causal = queries.shape[1] > 1

    def sdpa() -> Tensor:
        return functional.scaled_dot_product_attention(
            heads, key_heads, value_heads, is_causal=is_causal, enable_gqa=True
        )

    bench.measure(case, "torch SDPA, contiguous", sdpa, num_bytes=num_bytes, flops=flops)
    try:
        attend: Any = importlib.import_module("flash_attn").flash_attn_func
    except ImportError:
        return
    bench.measure(
        case,
        "flash-attn, contiguous",
        lambda: attend(queries, keys, values, causal=True),
        num_bytes=num_bytes,
        flops=flops,
    )
