"""Attention of few queries per sequence: decoding, and the verification of drafts.

Split-KV (flash-decoding; Dao et al., FlashAttention-2, arXiv:2307.08691): the tokens that a
sequence sees are divided among programs, and a second kernel combines what they found, by the
greatest score of each. All query heads of a KV head, times the queries of the sequence, are the
rows of a tile: the cache is read once for all of them (Ainslie et al., arXiv:2305.13245).

In how many parts a sequence can be divided is known to the host, by the sizes it knows, and is the
same when a captured step runs again. How long each part is, is decided by the real lengths: a part
that gets nothing exits, and a sequence that is one part writes its output itself.

What bounds it is reading the cache: 2 * kv_heads * head_dim elements a token. An H100 needs about
20 KiB under way per multiprocessor (3 TB/s * 0.9 us / 132) to be busy with that.
"""

from __future__ import annotations

import torch
from torch import Tensor
from triton import jit, next_power_of_2
from triton import language as tl

from services.engine.core.kernels.attention import AttentionMetadata
from services.engine.core.kernels.kv_layer import KVLayer
from services.engine.core.kernels.triton.attention_call import (
    Pattern,
    constants,
    numbers,
    pointers,
)
from services.engine.core.kernels.triton.attention_parts import (
    LEAST,
    Cached,
    Cut,
    Rows,
    attend_tile,
    no_tokens,
    seen_tiles,
)
from services.engine.core.kernels.triton.attention_tiles import Card, decode_splits, decode_tiles


@jit
def _parts(  # type: ignore[no-untyped-def]
    context, query_length, least_tiles, most_splits, window, global_tokens, tile_tokens
):
    """How a sequence is divided: the first token that a window shows, what `seen_tiles` returns,
    and how many of these tiles make a part."""
    first = 0
    if window > 0:
        first = tl.maximum(context - query_length - window + 1, 0)
    leading, skipped, count = seen_tiles(first, context, global_tokens, tile_tokens)
    return first, leading, skipped, count, tl.maximum(tl.cdiv(count, most_splits), least_tiles)


# Of these there are too many to compile the kernels for each.
_SIZES = ["num_heads", "num_rows", "most_queries", "most_splits", "least_tiles"]


@jit(do_not_specialize=[*_SIZES, "table_stride", "row_tiles"])
def decode_kernel(  # type: ignore[no-untyped-def]
    queries,
    keys,
    values,
    key_scales,
    value_scales,
    tables,
    starts,
    contexts,
    output,
    partial_outputs,
    partial_sums,
    scale,
    softcap,
    query_stride,
    query_head_stride,
    table_stride,
    block_stride,
    token_stride,
    head_stride,
    scale_block_stride,
    scale_token_stride,
    num_heads,
    num_rows,
    row_tiles,
    most_queries,
    most_splits,
    least_tiles,
    heads_per_kv: tl.constexpr,
    head_dim: tl.constexpr,
    width: tl.constexpr,
    block_size: tl.constexpr,
    tile_rows: tl.constexpr,
    tile_tokens: tl.constexpr,
    window: tl.constexpr,
    global_tokens: tl.constexpr,
    far: tl.constexpr,
    compute: tl.constexpr,
):
    """One program: a KV head, a tile of rows of a sequence, a part of what the sequence sees.

    partial_outputs: [most_splits, num_rows, head_dim] float32, undivided; partial_sums:
    [most_splits, num_rows, 2] float32, greatest score and sum; num_rows: tokens * heads. Sequences
    of more than most_queries queries are another kernel's.
    """
    kv_head = tl.program_id(0)
    sequence = tl.program_id(1) // row_tiles
    row_tile = tl.program_id(1) % row_tiles
    split = tl.program_id(2)
    start = tl.load(starts + sequence)
    query_length = tl.load(starts + sequence + 1) - start
    context = tl.load(contexts + sequence)
    first, leading, skipped, count, share = _parts(
        context, query_length, least_tiles, most_splits, window, global_tokens, tile_tokens
    )
    begin = split * share
    has_rows = row_tile * tile_rows < query_length * heads_per_kv
    if (begin >= count) | (query_length > most_queries) | (not has_rows):
        return
    rows = row_tile * tile_rows + tl.arange(0, tile_rows)
    query = rows // heads_per_kv
    tokens = start + query
    heads = kv_head * heads_per_kv + rows % heads_per_kv
    dims = tl.arange(0, width)
    is_query = query < query_length
    elements = is_query[:, None] & (dims < head_dim)[None, :]
    at = tokens.to(tl.int64) * query_stride + heads * query_head_stride
    q = tl.load(queries + at[:, None] + dims[None, :], mask=elements, other=0.0).to(compute)
    if key_scales is not None:
        key_scales += kv_head
        value_scales += kv_head
    cached = Cached(
        keys + kv_head.to(tl.int64) * head_stride,
        values + kv_head.to(tl.int64) * head_stride,
        key_scales,
        value_scales,
        tables + sequence.to(tl.int64) * table_stride,
        first,
        context,
        block_stride,
        token_stride,
        scale_block_stride,
        scale_token_stride,
    )
    cut: tl.constexpr = Cut(head_dim, width, block_size, tile_tokens, window, global_tokens, far)
    own = Rows(q, context - query_length + query, scale, softcap)
    softmax = no_tokens(tile_rows, width)
    for index in range(begin, tl.minimum(begin + share, count)):
        tile = index + tl.where(index >= leading, skipped, 0)
        softmax = attend_tile(tile, own, softmax, cached, cut, True)
    accumulated, greatest, total = softmax
    if share >= count:
        to = (tokens.to(tl.int64) * num_heads + heads)[:, None] * head_dim + dims[None, :]
        tl.store(output + to, accumulated / tl.where(is_query, total, 1.0)[:, None], mask=elements)
    else:
        row = split.to(tl.int64) * num_rows + tokens * num_heads + heads
        to = row[:, None] * head_dim + dims[None, :]
        tl.store(partial_outputs + to, accumulated, mask=elements)
        tl.store(partial_sums + row * 2, greatest, mask=is_query)
        tl.store(partial_sums + row * 2 + 1, total, mask=is_query)


@jit(do_not_specialize=_SIZES)
def combine_kernel(  # type: ignore[no-untyped-def]
    partial_outputs,
    partial_sums,
    starts,
    contexts,
    output,
    num_heads,
    num_rows,
    most_queries,
    most_splits,
    least_tiles,
    head_dim: tl.constexpr,
    width: tl.constexpr,
    tile_tokens: tl.constexpr,
    ceiling: tl.constexpr,
    window: tl.constexpr,
    global_tokens: tl.constexpr,
):
    """One program: a head of a query, of a sequence that `decode_kernel` has divided.

    ceiling: a power of two, at least most_splits.
    """
    head = tl.program_id(0)
    sequence = tl.program_id(1)
    query = tl.program_id(2)
    start = tl.load(starts + sequence)
    query_length = tl.load(starts + sequence + 1) - start
    context = tl.load(contexts + sequence)
    _, _, _, count, share = _parts(
        context, query_length, least_tiles, most_splits, window, global_tokens, tile_tokens
    )
    if (share >= count) | (query_length > most_queries) | (query >= query_length):
        return
    splits = tl.arange(0, ceiling)
    dims = tl.arange(0, width)
    is_part = splits * share < count
    row = (start + query) * num_heads + head
    at = splits.to(tl.int64) * num_rows + row
    greatest = tl.load(partial_sums + at * 2, mask=is_part, other=LEAST)
    totals = tl.load(partial_sums + at * 2 + 1, mask=is_part, other=0.0)
    elements = is_part[:, None] & (dims < head_dim)[None, :]
    parts = tl.load(
        partial_outputs + at[:, None] * head_dim + dims[None, :], mask=elements, other=0.0
    )
    weights = tl.exp2(greatest - tl.max(greatest, 0))
    attended = tl.sum(parts * weights[:, None], 0) / tl.sum(totals * weights, 0)
    to = row.to(tl.int64) * head_dim
    tl.store(output + to + dims, attended, mask=dims < head_dim)


# Of what both are compiled for.
_OF_COMBINE = ("head_dim", "width", "tile_tokens", "window", "global_tokens")


def attend_few(
    queries: Tensor,
    cache: KVLayer,
    metadata: AttentionMetadata,
    pattern: Pattern,
    output: Tensor,
    most_queries: int,
) -> None:
    """Write the attention of all sequences of up to `most_queries` queries to their rows of output.

    queries, output: [num_tokens, heads, head_dim]; most_queries bounds the grid.
    """
    num_tokens, num_heads, head_dim = queries.shape
    kv_heads = cache.keys.shape[2]
    heads_per_kv = num_heads // kv_heads
    card = Card.of(queries.device)
    num_rows = most_queries * heads_per_kv
    tiles = decode_tiles(card, head_dim, cache.keys.dtype, num_rows)
    row_tiles = -(-num_rows // tiles.rows)
    seen = metadata.max_context_length
    if pattern.window is not None:
        seen = min(seen, pattern.window + most_queries + pattern.global_tokens)
    programs = kv_heads * metadata.num_sequences * row_tiles
    splits, least_tiles = decode_splits(card, programs, -(-seen // tiles.tokens), tiles)
    partial_outputs = partial_sums = output  # of which nothing is read or written
    if splits > 1:
        rows = num_tokens * num_heads
        partial_outputs = queries.new_empty((splits, rows, head_dim), dtype=torch.float32)
        partial_sums = queries.new_empty((splits, rows, 2), dtype=torch.float32)
    compiled_for = constants(queries, cache, metadata, pattern, tiles)
    decode_kernel[kv_heads, metadata.num_sequences * row_tiles, splits](
        *pointers(queries, cache, metadata, output),
        partial_outputs,
        partial_sums,
        *numbers(queries, cache, metadata, pattern),
        num_tokens * num_heads,
        row_tiles,
        most_queries,
        splits,
        least_tiles,
        **compiled_for,
    )
    if splits > 1:
        lengths = metadata.device_lengths
        combine_kernel[num_heads, metadata.num_sequences, most_queries](
            partial_outputs,
            partial_sums,
            lengths.query_starts,
            lengths.contexts,
            output,
            num_heads,
            num_tokens * num_heads,
            most_queries,
            splits,
            least_tiles,
            ceiling=next_power_of_2(splits),
            **{name: compiled_for[name] for name in _OF_COMBINE},
        )
