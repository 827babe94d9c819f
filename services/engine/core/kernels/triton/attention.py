"""Attention over the paged cache of a GPU: which of two kernels a step's sequences are for."""

from __future__ import annotations

import torch
from torch import Tensor

from services.engine.core.kernels import triton
from services.engine.core.kernels.attention import AttentionMetadata, paged_attention
from services.engine.core.kernels.kv_layer import KVLayer
from services.engine.core.kernels.triton.attention_call import Pattern
from services.engine.core.kernels.triton.attention_decode import attend_few
from services.engine.core.kernels.triton.attention_extend import attend_many
from services.engine.core.kernels.triton.attention_tiles import Card, extend_tiles

# Sequences of up to so many queries have their tokens divided among programs: there are not enough
# tiles of queries to keep a card busy, and reading the cache is what takes the time.
FEW_QUERIES = 16
# Elements. Of wider ones not even 16 rows fit into a program's registers.
WIDEST_HEAD = 256


@paged_attention.implementation("cuda", name="triton", unavailable=triton.why_not)
def paged_attention_triton(
    queries: Tensor,
    cache: KVLayer,
    metadata: AttentionMetadata,
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
    global_tokens: int = 0,
) -> Tensor:
    """By one kernel for sequences of few queries, and one for those of many.

    Both are launched over all sequences and leave those of the other; where what the host knows
    says that there are none, one of them is not. Heads wider than WIDEST_HEAD, blocks whose size is
    no power of two, and values that lie otherwise than keys are left to the reference.
    """
    if not _is_served(queries, cache, metadata):
        return paged_attention.reference(
            queries, cache, metadata, scale, window, softcap, global_tokens
        )
    pattern = Pattern(scale, window, softcap, global_tokens)
    output = torch.empty(queries.shape, dtype=queries.dtype, device=queries.device)
    few = _most_queries_of_few(metadata)
    tiles = extend_tiles(Card.of(queries.device), queries.shape[2], cache.keys.dtype)
    if queries.shape[1] // cache.keys.shape[2] > tiles.rows:
        few = metadata.max_query_length
    if few:
        attend_few(queries, cache, metadata, pattern, output, few)
    if few < metadata.max_query_length:
        attend_many(queries, cache, metadata, pattern, output, few + 1)
    return output


def _is_served(queries: Tensor, cache: KVLayer, metadata: AttentionMetadata) -> bool:
    keys, scales, size = cache.keys, cache.key_scales, metadata.block_size
    return (
        queries.shape[2] <= WIDEST_HEAD
        and size & (size - 1) == 0
        and queries.stride(2) == keys.stride(3) == 1
        and keys.stride() == cache.values.stride()
        and (
            scales is None
            or cache.value_scales is None
            or (scales.stride() == cache.value_scales.stride() and scales.stride(2) == 1)
        )
    )


def _most_queries_of_few(metadata: AttentionMetadata) -> int:
    """The most queries of a sequence that has few; 0: there is none such."""
    if metadata.max_query_length <= FEW_QUERIES:
        return metadata.max_query_length
    if metadata.are_bounds:
        return FEW_QUERIES
    return metadata.once(
        "most queries of few",
        lambda: max((each for each in metadata.query_lengths if each <= FEW_QUERIES), default=0),
    )
