"""What the kernels of attention are called with, whichever of them it is."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from triton import language as tl
from triton import next_power_of_2

from services.engine.core.kernels.attention import AttentionMetadata
from services.engine.core.kernels.kv_layer import KVLayer
from services.engine.core.kernels.triton.attention_tiles import Card, Tiles


@dataclass(frozen=True, slots=True)
class Pattern:
    """What a query sees, and how its products with keys become scores; see `paged_attention`."""

    scale: float
    window: int | None
    softcap: float | None
    global_tokens: int

    @property
    def constants(self) -> dict[str, int]:
        """Those that kernels are compiled for."""
        if self.window is None:
            return {"window": 0, "global_tokens": 0}
        return {"window": self.window, "global_tokens": self.global_tokens}


def pointers(
    queries: Tensor, cache: KVLayer, metadata: AttentionMetadata, output: Tensor
) -> tuple[Tensor | None, ...]:
    """What the kernels read and write, in the order of their arguments."""
    keys, values = cache.keys, cache.values
    if keys.dtype == torch.float8_e4m3fn and not Card.of(queries.device).converts_fp8:
        keys, values = keys.view(torch.uint8), values.view(torch.uint8)
    lengths = metadata.device_lengths
    tables = metadata.block_tables
    scales = cache.key_scales, cache.value_scales
    return queries, keys, values, *scales, tables, lengths.query_starts, lengths.contexts, output


def numbers(
    queries: Tensor, cache: KVLayer, metadata: AttentionMetadata, pattern: Pattern
) -> tuple[float | None, ...]:
    """How scores are made, strides, and the number of heads, in the order of their arguments."""
    of_scales = (0, 0) if cache.key_scales is None else cache.key_scales.stride()[:2]
    return (
        *(pattern.scale, pattern.softcap),
        *queries.stride()[:2],
        metadata.block_tables.stride(0),
        *cache.keys.stride()[:3],
        *of_scales,
        queries.shape[1],
    )


def constants(
    queries: Tensor, cache: KVLayer, metadata: AttentionMetadata, pattern: Pattern, tiles: Tiles
) -> dict[str, Any]:
    """What the kernels are compiled for."""
    head_dim = queries.shape[2]
    return {
        "heads_per_kv": queries.shape[1] // cache.keys.shape[2],
        "head_dim": head_dim,
        "width": next_power_of_2(head_dim),
        "block_size": metadata.block_size,
        "tile_rows": tiles.rows,
        "tile_tokens": tiles.tokens,
        **pattern.constants,
        "far": is_far(cache),
        "compute": compute_type(queries.dtype, cache.keys.dtype),
        "num_warps": tiles.num_warps,
        "num_stages": tiles.num_stages,
    }


def is_far(cache: KVLayer) -> bool:
    """Whether 32 bits do not count the elements from a cache's first to its last."""
    (blocks, tokens, *_), (block_stride, token_stride, *_) = cache.keys.shape, cache.keys.stride()
    return blocks * block_stride + tokens * token_stride >= 1 << 31


def compute_type(queries: torch.dtype, kv: torch.dtype) -> Any:
    """What the matrix units multiply: what queries and cache can both be converted to.

    Eight-bit floats become float16 in one instruction for two of them, and bfloat16 in five.
    """
    if queries == torch.float32 or kv == torch.float32:
        return tl.float32
    if kv == torch.float8_e4m3fn or queries == torch.float16:
        return tl.float16
    return tl.bfloat16
