"""Attention of many queries per sequence: prompts, in one piece or in chunks, and what follows a
prefix that is in the cache.

FlashAttention-2 (Dao, arXiv:2307.08691): a program keeps a tile of queries, goes through the tiles
of keys and values that they see, and divides once, at the end. A tile of keys that nobody sees is
not looked at; where all rows see all of its tokens there is no mask. The rows of a tile are the
query heads of one KV head times as many queries as fit: these see nearly the same tokens, so that
less of the tiles at the diagonal is computed for nothing.

What bounds it is the matrix units. Each tile of keys and values is read, through the block table,
for `rows` rows: 128 rows of an H100's matrix units, at 800 TFLOP/s, eat 6 TB/s of its L2 cache.

On Hopper they compute the scores of a tile while those of the one before become weights. At
head_dim 128 a tile of 64 tokens is 1,024 cycles of a multiprocessor's matrix units, and 440
instructions of each of its eight warps, 880 cycles of their issue: one after the other, as it is
where all warps wait for the scores of their own tile, the matrix units would be busy for little
more than half of the time.
"""

from __future__ import annotations

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
    Cached,
    Cut,
    Rows,
    attend_tile,
    find_tile,
    no_tokens,
    score_tile,
    seen_tiles,
    weigh_tile,
)
from services.engine.core.kernels.triton.attention_tiles import Card, extend_tiles


@jit
def _tile_of(index, leading, skipped, window: tl.constexpr):  # type: ignore[no-untyped-def]
    tile = index
    if window > 0:
        tile += tl.where(index >= leading, skipped, 0)
    return tile


@jit(do_not_specialize=["table_stride", "num_heads", "num_sequences", "fewest_queries"])
def extend_kernel(  # type: ignore[no-untyped-def]
    queries,
    keys,
    values,
    key_scales,
    value_scales,
    tables,
    starts,
    contexts,
    output,
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
    num_sequences,
    fewest_queries,
    most_sequences: tl.constexpr,
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
    scores_ahead: tl.constexpr,
):
    """One program: a KV head and a tile of queries.

    Sequence i has the tiles from starts[i] // tile_queries + i on, which leaves enough for each:
    the grid is known from the number of tokens and that of sequences. The last tiles, which see
    most, are begun first. Sequences of fewer than fewest_queries queries are another kernel's.
    most_sequences: a power of two, at least num_sequences.
    """
    tile_queries: tl.constexpr = tile_rows // heads_per_kv
    kv_head = tl.program_id(0)
    slot = tl.num_programs(1) - 1 - tl.program_id(1)
    each = tl.arange(0, most_sequences)
    first_slots = tl.load(starts + each, mask=each < num_sequences, other=0) // tile_queries + each
    is_before = (first_slots <= slot) & (each < num_sequences)
    sequence = tl.sum(is_before.to(tl.int32), 0) - 1
    start = tl.load(starts + sequence)
    query_length = tl.load(starts + sequence + 1) - start
    first_query = (slot - start // tile_queries - sequence) * tile_queries
    if (first_query >= query_length) | (query_length < fewest_queries):
        return
    context = tl.load(contexts + sequence)
    rows = tl.arange(0, tile_rows)
    query = first_query + rows // heads_per_kv
    heads = kv_head * heads_per_kv + rows % heads_per_kv
    dims = tl.arange(0, width)
    is_query = (rows < tile_queries * heads_per_kv) & (query < query_length)
    elements = is_query[:, None] & (dims < head_dim)[None, :]
    tokens = (start + query).to(tl.int64)
    at = tokens * query_stride + heads * query_head_stride
    q = tl.load(queries + at[:, None] + dims[None, :], mask=elements, other=0.0).to(compute)
    # What the first and the last of the queries see.
    first_position = context - query_length + first_query
    last_position = tl.minimum(first_position + tile_queries, context) - 1
    end = last_position + 1
    first = 0
    if window > 0:
        first = tl.maximum(first_position - window + 1, 0)
    leading, skipped, count = seen_tiles(first, end, global_tokens, tile_tokens)
    # Tiles from `whole` on, up to `cut_off`, are seen by all rows, and need no mask.
    whole = 0
    if window > 0:
        whole = tl.cdiv(tl.maximum(last_position - window + 1, 0), tile_tokens) - skipped
        whole = tl.minimum(tl.maximum(whole, leading), count)
    cut_off = tl.maximum((first_position + 1) // tile_tokens - skipped, whole)
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
        end,
        block_stride,
        token_stride,
        scale_block_stride,
        scale_token_stride,
    )
    cut: tl.constexpr = Cut(head_dim, width, block_size, tile_tokens, window, global_tokens, far)
    own = Rows(q, context - query_length + query, scale, softcap)
    softmax = no_tokens(tile_rows, width)
    if scores_ahead:
        tile = _tile_of(0, leading, skipped, window)
        places, of_scales = find_tile(tile, cached, cut, True)
        scores = score_tile(places, of_scales, q, cached, cut)
    # The last tile's scores are not ahead of anything.
    most = count - 1 if scores_ahead else count
    for phase in tl.static_range(0 if window > 0 else 1, 3):
        if phase == 0:
            begin, stop = 0, tl.minimum(whole, most)
        elif phase == 1:
            begin, stop = whole, tl.minimum(cut_off, most)
        else:
            begin, stop = cut_off, most
        for index in range(begin, stop):
            tile = _tile_of(index, leading, skipped, window)
            if scores_ahead:
                after = _tile_of(index + 1, leading, skipped, window)
                next_places, next_of_scales = find_tile(after, cached, cut, True)
                next_scores = score_tile(next_places, next_of_scales, q, cached, cut)
                softmax = weigh_tile(
                    tile, places, of_scales, scores, own, softmax, cached, cut, phase != 1
                )
                places, of_scales, scores = next_places, next_of_scales, next_scores
            else:
                softmax = attend_tile(tile, own, softmax, cached, cut, phase != 1)
    if scores_ahead:
        tile = _tile_of(count - 1, leading, skipped, window)
        softmax = weigh_tile(tile, places, of_scales, scores, own, softmax, cached, cut, True)
    accumulated, _, total = softmax
    to = (tokens * num_heads + heads)[:, None] * head_dim + dims[None, :]
    tl.store(output + to, accumulated / tl.where(is_query, total, 1.0)[:, None], mask=elements)


def attend_many(
    queries: Tensor,
    cache: KVLayer,
    metadata: AttentionMetadata,
    pattern: Pattern,
    output: Tensor,
    fewest_queries: int,
) -> None:
    """Write the attention of sequences of `fewest_queries` or more queries to their rows of output.

    queries, output: [num_tokens, heads, head_dim].
    """
    num_heads, head_dim = queries.shape[1:]
    kv_heads = cache.keys.shape[2]
    tiles = extend_tiles(Card.of(queries.device), head_dim, cache.keys.dtype)
    tile_queries = tiles.rows // (num_heads // kv_heads)
    num_slots = len(queries) // tile_queries + metadata.num_sequences
    extend_kernel[kv_heads, num_slots](
        *pointers(queries, cache, metadata, output),
        *numbers(queries, cache, metadata, pattern),
        metadata.num_sequences,
        fewest_queries,
        most_sequences=next_power_of_2(metadata.num_sequences),
        scores_ahead=tiles.scores_ahead,
        **constants(queries, cache, metadata, pattern, tiles),
    )
