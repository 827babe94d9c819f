"""What kernels that choose tokens do to a row of logits.

A row is split over several programs where there are few rows; the last of them to be done finishes
the row. What is added up are integers, weights in units of 2**-40, so that neither the order nor
the split changes a sum: a row's token does not depend on the rows beside it. (A float32 weight of
the likeliest token is no finer than 2**-24.)
"""

from __future__ import annotations

import torch
from torch import Tensor
from triton import cdiv, jit
from triton import language as tl

UNIT = tl.constexpr(float(2**40))
OF_INFINITY = tl.constexpr(0x7F800000)
OF_MINUS_INFINITY = tl.constexpr(-0x7F800001)
OF_NAN = tl.constexpr(0x7FFFFFFF)
BIAS = tl.constexpr(2**31)
# Enough for every SM of a large card to have several.
_PROGRAMS = 528
# Halvings of the range in which the least of the candidates is looked for.
_HALVINGS = tl.constexpr(16)
# exp(-40) is too little to matter in any vocabulary.
_DEPTH = tl.constexpr(40.0)


@jit
def ordered(values):  # type: ignore[no-untyped-def]
    """int32 in the order of float32 `values`; both zeros are the same, NaN is above all."""
    bits = tl.where(values == 0.0, 0.0, values).to(tl.int32, bitcast=True)
    bits = bits ^ ((bits >> 31) & 0x7FFFFFFF)
    return tl.where(values == values, bits, OF_NAN)


@jit
def weights(values, peak):  # type: ignore[no-untyped-def]
    """exp(values - peak) as integers; 2**40 for the largest, whatever that is."""
    return (tl.exp(tl.where(values == peak, 0.0, values - peak)) * UNIT).to(tl.int64)


@jit
def own_of(row, logits, maxima, masses, vocab, stride, block_size: tl.constexpr):  # type: ignore[no-untyped-def]
    """Where the logits of a row begin, and what is kept of its blocks."""
    blocks = row * tl.cdiv(vocab, block_size)
    return logits + row.to(tl.int64) * stride, maxima + blocks, masses + blocks


@jit
def scan(  # type: ignore[no-untyped-def]
    logits,
    divisor,
    maxima,
    masses,
    vocab,
    first_tile,
    tiles,
    weigh: tl.constexpr,
    tile_size: tl.constexpr,
    block_size: tl.constexpr,
):
    """The largest of `tiles` tiles of a row, packed: what is larger, and of those that tie the
    first token, is the larger number. With weigh, the largest and the mass of each block of the
    logits over `divisor` are kept."""
    column = tl.arange(0, block_size)[None, :]
    best = tl.full((tile_size, block_size), -float("inf"), tl.float32)
    best_token = tl.zeros((tile_size, block_size), tl.int32) + column
    spoiled = best > 0.0
    for tile in range(first_tile, first_tile + tiles):
        block = tile * tile_size + tl.arange(0, tile_size)
        token = block[:, None] * block_size + column
        values = tl.load(logits + token, token < vocab, other=-float("inf")).to(tl.float32)
        larger = values > best
        best = tl.where(larger, values, best)
        best_token = tl.where(larger, token, best_token)
        spoiled = spoiled | (values != values)
        if weigh:
            if divisor is not None:
                values = tl.div_rn(values, divisor)
            peaks = tl.max(values, 1)
            inside = block * block_size < vocab
            tl.store(maxima + block, peaks, inside)
            tl.store(masses + block, tl.sum(weights(values, peaks[:, None]), 1), inside)
    key = tl.where(spoiled, OF_NAN, ordered(best)).to(tl.int64)
    return tl.max(((key + BIAS) << 31) + (best_token ^ OF_NAN))


@jit
def arrives_last(counter, programs):  # type: ignore[no-untyped-def]
    """Whether all other programs of a row have been here, and what they wrote can be read."""
    tl.debug_barrier()
    last = tl.atomic_add(counter, 1, sem="acq_rel") == programs - 1
    tl.debug_barrier()
    if last:
        tl.store(counter, 0)
    return last


@jit
def unpack_best(best):  # type: ignore[no-untyped-def]
    """The token of the largest logit of a row, and whether it can be sampled from; forgets it."""
    packed = tl.atomic_xchg(best, 0)
    key = (packed >> 31) - BIAS
    fine = (key < OF_INFINITY) & (key > OF_MINUS_INFINITY)
    return (packed & OF_NAN) ^ OF_NAN, fine


@jit
def load_blocks(maxima, masses, vocab, num_blocks: tl.constexpr, block_size: tl.constexpr):  # type: ignore[no-untyped-def]
    """Of the blocks of a row: their largest, the largest of them, their masses, and these in the
    units of the row."""
    block = tl.arange(0, num_blocks)
    inside = block * block_size < vocab
    # They are written by other programs: not to be looked for near this one.
    peaks = tl.load(maxima + block, inside, other=-float("inf"), cache_modifier=".cg")
    own = tl.load(masses + block, inside, other=0, cache_modifier=".cg")
    peak = tl.max(peaks, 0)
    factors = tl.exp(tl.where(peaks == peak, 0.0, peaks - peak))
    shared = (own.to(tl.float64) * factors.to(tl.float64)).to(tl.int64)
    return peaks, peak, own, shared


@jit
def draw(  # type: ignore[no-untyped-def]
    logits,
    divisor,
    uniform,
    peaks,
    own,
    shared,
    vocab,
    num_blocks: tl.constexpr,
    block_size: tl.constexpr,
):
    """The token at which the cumulative distribution passes `uniform`."""
    cumulative = tl.cumsum(shared, 0)
    total = tl.sum(shared, 0)
    target = tl.minimum((uniform * total.to(tl.float64)).to(tl.int64), total - 1)
    passed = cumulative <= target
    block = tl.minimum(tl.sum(passed.to(tl.int32), 0), (vocab - 1) // block_size)
    here = tl.arange(0, num_blocks) == block
    rest = target - tl.max(tl.where(passed, cumulative, 0), 0)
    mass = tl.sum(tl.where(here, own, 0), 0)
    share = tl.maximum(tl.sum(tl.where(here, shared, 0), 0), 1)
    inner = rest.to(tl.float64) * (mass.to(tl.float64) / share.to(tl.float64))
    inner = tl.minimum(inner.to(tl.int64), mass - 1)
    token = block * block_size + tl.arange(0, block_size)
    values = tl.load(logits + token, token < vocab, other=-float("inf")).to(tl.float32)
    values = tl.div_rn(values, divisor)
    peak = tl.max(tl.where(here, peaks, -float("inf")), 0)
    before = tl.cumsum(weights(values, peak), 0) <= inner
    return tl.minimum(block * block_size + tl.sum(before.to(tl.int32), 0), vocab - 1)


@jit
def bound_for_count(peaks, peak, wanted):  # type: ignore[no-untyped-def]
    """A value that no fewer than `wanted` logits reach, and not many more where it can be helped:
    as many blocks have a logit that large."""
    some = peaks > -float("inf")
    near = tl.zeros((), tl.float32)
    far = peak - tl.min(tl.where(some, peaks, peak), 0)
    enough = tl.sum(some.to(tl.int32), 0) >= wanted
    for _ in range(_HALVINGS):
        middle = 0.5 * (near + far)
        deep = tl.sum((peaks >= peak - middle).to(tl.int32), 0) >= wanted
        near = tl.where(deep, near, middle)
        far = tl.where(deep, middle, far)
    return tl.where(enough, peak - far, -float("inf"))


@jit
def bound_for_mass(peaks, peak, shared, top_p, block_size: tl.constexpr):  # type: ignore[no-untyped-def]
    """A value that all logits together reach that top-p keeps.

    What is left out below a value x weighs no more than the blocks whose largest is below x, and of
    each other block what is not its largest, or one x for each of its other logits. That is held to
    be less than what top-p leaves out, with a little room for rounding.
    """
    masses = shared.to(tl.float32)
    largest = tl.exp(tl.where(peaks == peak, 0.0, peaks - peak)) * UNIT
    others = tl.maximum(masses - largest, 0.0)
    allowed = 0.999 * (1.0 - top_p).to(tl.float32) * tl.sum(shared, 0).to(tl.float32)
    near = tl.zeros((), tl.float32)
    far = tl.full((), _DEPTH, tl.float32)
    for _ in range(_HALVINGS):
        middle = 0.5 * (near + far)
        each = tl.minimum(others, (block_size - 1) * UNIT * tl.exp(-middle))
        left_out = tl.sum(tl.where(peaks >= peak - middle, each, masses), 0)
        deep = left_out <= allowed
        near = tl.where(deep, near, middle)
        far = tl.where(deep, middle, far)
    return tl.where(far < _DEPTH, peak - far, -float("inf"))


@jit
def gather(  # type: ignore[no-untyped-def]
    logits,
    divisor,
    least,
    candidates,
    candidate_tokens,
    found,
    vocab,
    first_tile,
    tiles,
    tile_size: tl.constexpr,
    capacity: tl.constexpr,
):
    """Write the logits from `least` up, over `divisor`, to the candidates of the row, as far as
    there is room, and count them all. Their order is not that of tokens."""
    for tile in range(first_tile, first_tile + tiles):
        token = tile * tile_size + tl.arange(0, tile_size)
        values = tl.load(logits + token, token < vocab, other=-float("inf")).to(tl.float32)
        scaled = values if divisor is None else tl.div_rn(values, divisor)
        kept = ((scaled >= least) & (values > -float("inf"))).to(tl.int32)
        count = tl.sum(kept, 0)
        if count > 0:
            start = tl.atomic_add(found, count, sem="relaxed")
            place = start + tl.cumsum(kept, 0) - kept
            room = (kept > 0) & (place < capacity)
            tl.store(candidates + place, values, room)
            tl.store(candidate_tokens + place, token, room)


def is_read(logits: Tensor) -> bool:
    """Whether kernels read logits as they lie; others are left to the references."""
    return logits.stride(-1) == 1 and logits.dtype == torch.float32


def parts_of(rows: int, vocab: int, tile: int) -> tuple[int, int]:
    """Programs that share a row, and tiles for each."""
    tiles = cdiv(vocab, tile)
    each = cdiv(tiles, min(tiles, cdiv(_PROGRAMS, rows)))
    return cdiv(tiles, each), each
