"""Filters in Triton: the candidates of a row are gathered, then a program finds which it keeps.

What is kept begins at a logit that is found exactly, three bits of it in every round, as is the
token that is drawn: the candidates have no order.
"""

from __future__ import annotations

from torch import Tensor
from triton import jit
from triton import language as tl

from services.engine.core.kernels.sampling import (
    CANDIDATES,
    Column,
    SamplingForm,
    SamplingWorkspace,
)
from services.engine.core.kernels.triton.sampling_row import (
    BIAS,
    gather,
    ordered,
    parts_of,
    weights,
)
from services.engine.core.kernels.triton.specialisation import Specialisation

_TEMPERATURE = tl.constexpr(int(Column.TEMPERATURE))
_TOP_K = tl.constexpr(int(Column.TOP_K))
_TOP_P = tl.constexpr(int(Column.TOP_P))
_LOG_MIN_P = tl.constexpr(int(Column.LOG_MIN_P))
_UNIFORM = tl.constexpr(int(Column.UNIFORM))
_GIVEN = tl.constexpr(int(Column.GIVEN))

GATHER_TILE = 2048  # 16 logits a thread of four warps
# Of one program, that looks for the smallest logit kept and has its SM to itself at worst.
_SELECT_WARPS = 8
_CHUNK = 1024

# What `tallies` adds up.
_COUNT = tl.constexpr(0)
_MASS = tl.constexpr(1)
_MASS_BEFORE = tl.constexpr(2)


@jit
def tallies(  # type: ignore[no-untyped-def]
    values,
    tokens,
    size,
    divisor,
    peak,
    limits,
    least,
    by: tl.constexpr,
    chunk: tl.constexpr,
):
    """For each of eight `limits`: how many of a row's values reach it, or their mass, or the mass
    of those from `least` up whose token comes before it."""
    sums = tl.zeros((8, chunk), tl.int64)
    for start in tl.range(0, size, chunk, num_stages=4):
        place = start + tl.arange(0, chunk)
        inside = place < size
        scaled = tl.load(values + place, inside, other=-float("inf")).to(tl.float32)
        scaled = tl.div_rn(scaled, divisor)
        key = ordered(scaled).to(tl.int64) + BIAS
        amount = inside.to(tl.int64)
        if by != _COUNT:
            amount = tl.where(inside, weights(scaled, peak), 0)
        if by == _MASS_BEFORE:
            token = tl.load(tokens + place, inside, other=0).to(tl.int64)
            amount = tl.where(key >= least, amount, 0)
            counts = token[None, :] < limits[:, None]
        else:
            counts = key[None, :] >= limits[:, None]
        sums += tl.where(counts, amount[None, :], 0)
    return tl.sum(sums, 1)


@jit
def search(  # type: ignore[no-untyped-def]
    values,
    tokens,
    size,
    divisor,
    peak,
    wanted,
    least,
    by: tl.constexpr,
    num_bits: tl.constexpr,
    chunk: tl.constexpr,
):
    """The largest number of `num_bits` bits (a multiple of 3) that `wanted` or more reach in number
    or in mass, or before which no more mass than `wanted` lies."""
    digit = tl.arange(0, 8).to(tl.int64)
    found = tl.zeros((), tl.int64)
    for number in range(num_bits // 3):
        shift = num_bits - 3 - 3 * number
        limits = found + (digit << shift)
        sums = tallies(values, tokens, size, divisor, peak, limits, least, by, chunk)
        holds = sums <= wanted if by == _MASS_BEFORE else sums >= wanted
        # It holds up to some digit; for the first it does by what was found before.
        found += (tl.maximum(tl.sum(holds.to(tl.int64), 0), 1) - 1) << shift
    return found


@jit
def walk(logits, divisor, peak, least, target, vocab, chunk: tl.constexpr):  # type: ignore[no-untyped-def]
    """The token before which no more mass than `target` lies in what reaches `least` of a row."""
    passed = tl.zeros((), tl.int64)
    token = tl.zeros((), tl.int64)
    for start in tl.range(0, vocab, chunk, num_stages=4):
        place = start + tl.arange(0, chunk)
        scaled = tl.load(logits + place, place < vocab, other=-float("inf"))
        scaled = tl.div_rn(scaled, divisor)
        reaches = ordered(scaled).to(tl.int64) + BIAS >= least
        amount = tl.where((place < vocab) & reaches, weights(scaled, peak), 0)
        before = (passed + tl.cumsum(amount, 0) <= target) & (place < vocab)
        token += tl.sum(before.to(tl.int64), 0)
        passed += tl.sum(amount, 0)
    return token


@jit
def load_filters(parameters, columns, row, gives: tl.constexpr):  # type: ignore[no-untyped-def]
    """Temperature, top-k, top-p and the logarithm of min-p of a row, and whether it has a filter
    that matters."""
    temperature = tl.load(parameters + _TEMPERATURE * columns + row).to(tl.float32)
    top_k = tl.load(parameters + _TOP_K * columns + row).to(tl.int64)
    top_p = tl.load(parameters + _TOP_P * columns + row)
    log_min_p = tl.load(parameters + _LOG_MIN_P * columns + row).to(tl.float32)
    is_filtered = (top_k > 0) | (top_p < 1.0) | (log_min_p > -float("inf"))
    is_filtered = (temperature > 0.0) & is_filtered
    if gives:
        is_filtered = is_filtered & (tl.load(parameters + _GIVEN * columns + row) < 0)
    return temperature, top_k, top_p, log_min_p, is_filtered


@jit(do_not_specialize=["columns", "tiles"])
def gather_kernel(  # type: ignore[no-untyped-def]
    logits,
    parameters,
    found,
    bounds,
    candidates,
    candidate_tokens,
    columns,
    vocab,
    stride,
    tiles,
    gives: tl.constexpr,
    capacity: tl.constexpr,
    tile_size: tl.constexpr,
):
    """Grid: rows, parts of `tiles` tiles. Gathers the candidates of every row with filters."""
    row = tl.program_id(0)
    temperature, _, _, _, is_filtered = load_filters(parameters, columns, row, gives)
    if is_filtered:
        gather(
            logits + row.to(tl.int64) * stride,
            temperature,
            tl.load(bounds + row * 3 + 2).to(tl.float32),
            candidates + row * capacity,
            candidate_tokens + row * capacity,
            found + row,
            vocab,
            tl.program_id(1) * tiles,
            tiles,
            tile_size,
            capacity,
        )


@jit(do_not_specialize=["columns"])
def select_kernel(  # type: ignore[no-untyped-def]
    logits,
    parameters,
    chosen,
    found,
    bounds,
    candidates,
    tokens,
    columns,
    vocab,
    stride,
    gives: tl.constexpr,
    capacity: tl.constexpr,
    chunk: tl.constexpr,
):
    """Grid: rows. Writes the token of every row with filters, by its candidates; by the row itself
    where these were too many to be gathered."""
    row = tl.program_id(0)
    temperature, top_k, top_p, log_min_p, is_filtered = load_filters(
        parameters, columns, row, gives
    )
    if is_filtered:
        logits += row.to(tl.int64) * stride
        values = candidates + row * capacity
        tokens += row * capacity
        size = tl.load(found + row)
        tl.store(found + row, 0)
        is_flat = size > capacity
        if is_flat:
            values = logits
            size = vocab
        peak = tl.load(bounds + row * 3).to(tl.float32)
        floor = tl.zeros((), tl.int64)
        if top_k > 0:
            floor = search(values, tokens, size, temperature, peak, top_k, floor, _COUNT, 33, chunk)
        if top_p < 1.0:
            mass = tl.load(bounds + row * 3 + 1)
            if top_k > 0:
                limits = tl.zeros((8,), tl.int64) + floor
                sums = tallies(values, tokens, size, temperature, peak, limits, floor, _MASS, chunk)
                mass = tl.max(sums, 0).to(tl.float64)
            wanted = tl.maximum(tl.ceil(top_p * mass).to(tl.int64), 1)
            nucleus = search(
                values, tokens, size, temperature, peak, wanted, floor, _MASS, 33, chunk
            )
            floor = tl.maximum(floor, nucleus)
        floor = tl.maximum(floor, ordered(peak + log_min_p).to(tl.int64) + BIAS)
        limits = tl.zeros((8,), tl.int64) + floor
        sums = tallies(values, tokens, size, temperature, peak, limits, floor, _MASS, chunk)
        mass = tl.max(sums, 0)
        uniform = tl.load(parameters + _UNIFORM * columns + row)
        target = tl.minimum((uniform * mass.to(tl.float64)).to(tl.int64), mass - 1)
        if is_flat:
            token = walk(logits, temperature, peak, floor, target, vocab, chunk)
        else:
            token = search(
                values, tokens, size, temperature, peak, target, floor, _MASS_BEFORE, 24, chunk
            )
        tl.store(chosen + row, tl.minimum(token, vocab - 1))


def filter_rows(
    logits: Tensor,
    parameters: Tensor,
    chosen: Tensor,
    form: SamplingForm,
    workspace: SamplingWorkspace,
) -> None:
    """Choose the tokens of rows with filters, whose bounds are known."""
    rows, vocab = logits.shape
    parts, tiles = parts_of(rows, vocab, GATHER_TILE)
    gather_kernel[(rows, parts)](
        logits,
        parameters,
        workspace.found,
        workspace.bounds,
        workspace.candidates,
        workspace.candidate_tokens,
        chosen.stride(0),
        vocab,
        logits.stride(0),
        tiles,
        gives=form.gives,
        capacity=CANDIDATES,
        tile_size=GATHER_TILE,
    )
    select_kernel[(rows,)](
        logits,
        parameters,
        chosen,
        workspace.found,
        workspace.bounds,
        workspace.candidates,
        workspace.candidate_tokens,
        chosen.stride(0),
        vocab,
        logits.stride(0),
        gives=form.gives,
        capacity=CANDIDATES,
        chunk=_CHUNK,
        num_warps=_SELECT_WARPS,
    )


def _compiled() -> tuple[Specialisation, ...]:
    row = {"logits": "*fp32", "parameters": "*fp64", "bounds": "*fp64", "columns": "i32"}
    row |= {"found": "*i32", "candidates": "*fp32"}
    room = {"capacity": CANDIDATES, "gives": False}
    forms = []
    for numbers in ("i32:16", "i32"):
        shape = row | {"vocab": numbers, "stride": numbers}
        gathers = shape | {"candidate_tokens": "*i32", "tiles": "i32"}
        forms.append(Specialisation(gather_kernel, gathers, room | {"tile_size": GATHER_TILE}))
        selects = shape | {"tokens": "*i32", "chosen": "*i64"}
        forms.append(
            Specialisation(select_kernel, selects, room | {"chunk": _CHUNK}, _SELECT_WARPS)
        )
    return tuple(forms)


COMPILED = _compiled()
