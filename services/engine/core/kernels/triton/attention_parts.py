"""What the kernels of attention share: which tokens are seen, and one tile of the online softmax.

The online softmax is that of Milakov and Gimelshein, arXiv:1805.02867, as in FlashAttention-2 (Dao,
arXiv:2307.08691): of each row the greatest score so far, the sum of exponentials below it, and the
sum of values weighted by them, not yet divided. Exponentials are powers of two.
"""

from __future__ import annotations

from triton import jit
from triton import language as tl

from services.engine.core.kernels.triton.language import INTERPRETED, dot, sigmoid

LOG2_E = tl.constexpr(1.4426950408889634)
# Less than any score, and yet a number: differences of two of them are no NaN.
LEAST = tl.constexpr(-1.0e30)
# What eight-bit floats are too small by when their bits are taken for a float16's.
_FP8_FACTOR = tl.constexpr(256.0)


@jit
def seen_tiles(  # type: ignore[no-untyped-def]
    first, end, global_tokens: tl.constexpr, tile_tokens: tl.constexpr
):
    """The tiles of tokens that are seen: the global ones, and those of tokens [first, end).

    Returns how many come before those that are skipped, how many are skipped, and how many are
    left: of these the i-th is tile i, or i + skipped where i >= leading.
    """
    begin = first // tile_tokens
    leading = tl.minimum((global_tokens + tile_tokens - 1) // tile_tokens, begin)
    skipped = begin - leading
    return leading, skipped, tl.cdiv(end, tile_tokens) - skipped


@jit
def load_heads(pointers, mask, scales, compute: tl.constexpr):  # type: ignore[no-untyped-def]
    """Load vectors of the cache, [tile_tokens, width], as compute; scales: [tile_tokens] or None.

    Bytes are eight-bit floats (e4m3) for cards that cannot convert them: sign, exponent and
    mantissa are moved to where a float16 has them, and the exponents' biases differ by eight.
    """
    heads = tl.load(pointers) if mask is None else tl.load(pointers, mask=mask, other=0.0)
    if heads.dtype == tl.uint8:
        bits = heads.to(tl.uint16)
        bits = ((bits & 0x80) << 8) | ((bits & 0x7F) << 7)
        heads = bits.to(tl.float16, bitcast=True) * _FP8_FACTOR
    if scales is not None:
        heads = heads.to(tl.float32) * scales[:, None]
    elif INTERPRETED:
        heads = heads.to(tl.float32)
    return heads.to(compute)


@jit
def attend_tile(  # type: ignore[no-untyped-def]
    tile,
    q,
    accumulated,
    greatest,
    total,
    positions,
    first,
    end,
    keys,
    values,
    key_scales,
    value_scales,
    table,
    scale,
    softcap,
    block_stride,
    token_stride,
    scale_block_stride,
    scale_token_stride,
    head_dim: tl.constexpr,
    width: tl.constexpr,
    block_size: tl.constexpr,
    tile_tokens: tl.constexpr,
    window: tl.constexpr,
    global_tokens: tl.constexpr,
    far: tl.constexpr,
    masked: tl.constexpr,
):
    """Let rows of queries, [rows, width], attend to the tile_tokens tokens of a tile.

    positions: of the rows' queries. keys, values, key_scales, value_scales: of one KV head. masked:
    whether some row does not see some of the tokens; then those before `first` that are not global,
    and those from `end` on, are not so much as looked at. far: whether the cache has elements
    beyond what 32 bits count.
    Returns the online softmax, after these tokens: accumulated, greatest, total.
    """
    tokens = tile * tile_tokens + tl.arange(0, tile_tokens)
    dims = tl.arange(0, width)
    mask = None
    if masked:
        looked_at = tokens < end
        if window > 0:
            looked_at = looked_at & ((tokens >= first) | (tokens < global_tokens))
        blocks = tl.load(table + tokens // block_size, mask=looked_at, other=0)
        mask = looked_at[:, None] & (dims < head_dim)[None, :]
    else:
        blocks = tl.load(table + tokens // block_size)
        if width > head_dim:
            mask = (dims < head_dim)[None, :]
    if far:
        blocks = blocks.to(tl.int64)
    within = (tokens % block_size).to(blocks.dtype)
    offsets = blocks * block_stride + within * token_stride
    places = offsets[:, None] + dims[None, :]
    of_keys = None
    of_values = None
    if key_scales is not None:
        at = blocks * scale_block_stride + within * scale_token_stride
        if masked:
            of_keys = tl.load(key_scales + at, mask=looked_at, other=0.0)
            of_values = tl.load(value_scales + at, mask=looked_at, other=0.0)
        else:
            of_keys = tl.load(key_scales + at)
            of_values = tl.load(value_scales + at)
    # A token's scale is a factor of its scores and weights too: of these there are fewer, unless
    # rows are many. Then they would be spread over more threads than is good for loading them.
    few_rows: tl.constexpr = q.shape[0] < 64
    k = load_heads(keys + places, mask, None if few_rows else of_keys, q.dtype)
    scores = dot(q, tl.trans(k), tl.zeros((q.shape[0], tile_tokens), tl.float32))
    if few_rows and of_keys is not None:
        scores *= of_keys[None, :]
    factor = scale * LOG2_E
    if softcap is not None:
        # tanh(x) is 2 * sigmoid(2x) - 1.
        scores = (2.0 * sigmoid(scores * (2.0 * scale / softcap)) - 1.0) * softcap
        factor = LOG2_E
    if masked:
        seen = tokens[None, :] <= positions[:, None]
        if window > 0:
            near = tokens[None, :] > positions[:, None] - window
            seen = seen & (near | (tokens < global_tokens)[None, :])
        scores = tl.where(seen, scores, float("-inf"))
    higher = tl.maximum(greatest, tl.max(scores, 1) * factor)
    weights = tl.exp2(scores * factor - higher[:, None])
    decay = tl.exp2(greatest - higher)
    total = total * decay + tl.sum(weights, 1)
    if few_rows and of_values is not None:
        weights *= of_values[None, :]
    v = load_heads(values + places, mask, None if few_rows else of_values, q.dtype)
    accumulated = dot(weights.to(q.dtype), v, accumulated * decay[:, None])
    return accumulated, higher, total
