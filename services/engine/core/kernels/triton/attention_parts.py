"""What the kernels of attention share: which tokens are seen, and one tile of the online softmax.

The online softmax is that of Milakov and Gimelshein, arXiv:1805.02867, as in FlashAttention-2 (Dao,
arXiv:2307.08691): of each row the greatest score so far, the sum of exponentials below it, and the
sum of values weighted by them, not yet divided. Exponentials are powers of two.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from triton import jit
from triton import language as tl

from services.engine.core.kernels.triton.language import INTERPRETED, dot, sigmoid

LOG2_E = tl.constexpr(1.4426950408889634)
# Less than any score, and yet a number: differences of two of them are no NaN.
LEAST = tl.constexpr(-1.0e30)
# What eight-bit floats are too small by when their bits are taken for a float16's.
_FP8_FACTOR = tl.constexpr(256.0)


class Cut(NamedTuple):
    """How a kernel is cut, and what queries see: constants, all of them.

    width: head_dim's power of two; tile_tokens: of a tile of the cache; far: whether the cache has
    elements beyond what 32 bits count.
    """

    head_dim: Any
    width: Any
    block_size: Any
    tile_tokens: Any
    window: Any
    global_tokens: Any
    far: Any


class Cached(NamedTuple):
    """What a KV head keeps of a sequence: pointers to it, its block table, and strides of blocks
    and tokens; of its tokens some row sees the global ones and those in [first, end)."""

    key_memory: Any
    value_memory: Any
    key_scales: Any
    value_scales: Any
    table: Any
    first: Any
    end: Any
    block_stride: Any
    token_stride: Any
    scale_block_stride: Any
    scale_token_stride: Any


class Rows(NamedTuple):
    """Queries, [rows, width], their positions, and what makes scores of products with keys."""

    q: Any
    positions: Any
    scale: Any
    softcap: Any


class Softmax(NamedTuple):
    """The online softmax of rows: values summed up, [rows, width], the greatest score, and the sum
    of weights."""

    accumulated: Any
    greatest: Any
    total: Any


@jit
def no_tokens(rows: tl.constexpr, width: tl.constexpr):  # type: ignore[no-untyped-def]
    """The online softmax of rows that have seen nothing."""
    return Softmax(
        tl.zeros((rows, width), tl.float32),
        tl.full((rows,), LEAST, tl.float32),
        tl.zeros((rows,), tl.float32),
    )


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
def find_tile(tile, cached, cut: tl.constexpr, masked: tl.constexpr):  # type: ignore[no-untyped-def]
    """Where the tokens of a tile are in keys and values, and in their scales.

    masked: whether some row does not see some of them. Those that none sees are not looked at: the
    last token stands for them, so that no load needs a mask.
    """
    tokens = tile * cut.tile_tokens + tl.arange(0, cut.tile_tokens)
    if masked:
        seen = tokens < cached.end
        if cut.window > 0:
            seen = seen & ((tokens >= cached.first) | (tokens < cut.global_tokens))
        tokens = tl.where(seen, tokens, cached.end - 1)
    blocks = tl.load(cached.table + tokens // cut.block_size)
    if cut.far:
        blocks = blocks.to(tl.int64)
    within = (tokens % cut.block_size).to(blocks.dtype)
    of_scales = blocks * cached.scale_block_stride + within * cached.scale_token_stride
    return blocks * cached.block_stride + within * cached.token_stride, of_scales


@jit
def score_tile(places, of_scales, q, cached, cut: tl.constexpr):  # type: ignore[no-untyped-def]
    """The products of rows of queries with the keys of a tile, float32."""
    dims = tl.arange(0, cut.width)
    mask = None
    if cut.width > cut.head_dim:
        mask = (dims < cut.head_dim)[None, :]
    scales = None
    if cached.key_scales is not None:
        scales = tl.load(cached.key_scales + of_scales)
    # A token's scale is a factor of its scores and weights too: of these there are fewer, unless
    # rows are many. Then they would be spread over more threads than is good for loading them.
    few_rows: tl.constexpr = q.shape[0] < 64
    memory = cached.key_memory + places[:, None] + dims[None, :]
    k = load_heads(memory, mask, None if few_rows else scales, q.dtype)
    scores = dot(q, tl.trans(k), tl.zeros((q.shape[0], cut.tile_tokens), tl.float32))
    if few_rows and scales is not None:
        scores *= scales[None, :]
    return scores


@jit
def weigh_tile(  # type: ignore[no-untyped-def]
    tile, places, of_scales, scores, rows, softmax, cached, cut: tl.constexpr, masked: tl.constexpr
):
    """The online softmax after a tile of which the scores are known."""
    tokens = tile * cut.tile_tokens + tl.arange(0, cut.tile_tokens)
    dims = tl.arange(0, cut.width)
    mask = None
    if cut.width > cut.head_dim:
        mask = (dims < cut.head_dim)[None, :]
    scales = None
    if cached.value_scales is not None:
        scales = tl.load(cached.value_scales + of_scales)
    factor = rows.scale * LOG2_E
    if rows.softcap is not None:
        # tanh(x) is 2 * sigmoid(2x) - 1.
        bent = 2.0 * sigmoid(scores * (2.0 * rows.scale / rows.softcap)) - 1.0
        scores = bent * rows.softcap
        factor = LOG2_E
    if masked:
        shown = tokens[None, :] <= rows.positions[:, None]
        if cut.window > 0:
            near = tokens[None, :] > rows.positions[:, None] - cut.window
            shown = shown & (near | (tokens < cut.global_tokens)[None, :])
        scores = tl.where(shown, scores, float("-inf"))
    greatest = tl.maximum(softmax.greatest, tl.max(scores, 1) * factor)
    weights = tl.exp2(scores * factor - greatest[:, None])
    decay = tl.exp2(softmax.greatest - greatest)
    total = softmax.total * decay + tl.sum(weights, 1)
    few_rows: tl.constexpr = scores.shape[0] < 64
    if few_rows and scales is not None:
        weights *= scales[None, :]
    q = rows.q
    memory = cached.value_memory + places[:, None] + dims[None, :]
    v = load_heads(memory, mask, None if few_rows else scales, q.dtype)
    accumulated = dot(weights.to(q.dtype), v, softmax.accumulated * decay[:, None])
    return Softmax(accumulated, greatest, total)


@jit
def attend_tile(  # type: ignore[no-untyped-def]
    tile, rows, softmax, cached, cut: tl.constexpr, masked: tl.constexpr
):
    """Let rows attend to the tokens of a tile of the cache; return the online softmax after these.

    masked: whether some row does not see some of the tokens.
    """
    places, of_scales = find_tile(tile, cached, cut, masked)
    scores = score_tile(places, of_scales, rows.q, cached, cut)
    return weigh_tile(tile, places, of_scales, scores, rows, softmax, cached, cut, masked)
