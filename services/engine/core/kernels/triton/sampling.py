"""Choosing tokens in Triton: one pass over the logits, and another where filters are on.

The first finds the largest logit and the mass of every block of 128 logits. That is all that a
token is drawn from without filters; the mass of a block tells where to look. With filters it also
bounds from below what they keep, nearly always a few dozen to a few thousand logits of a
vocabulary; the second pass gathers these, and the last program of a row finds the smallest that is
kept, exactly, three bits of it in every round. Where they are too many to gather, because the
distribution is flat, the row itself takes their place.

Passes are bound by memory: at 3 TB/s an H100 reads 256 rows of 128k logits in 45 us. In that time
it has some 38 instructions for each, of which the exact division by the temperature takes ten (so
that logits tie here where they tie on a CPU), and the weight ten more.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor
from triton import cdiv, jit, next_power_of_2
from triton import language as tl

from services.engine.core.kernels.sampling import (
    BLOCK,
    CANDIDATES,
    Column,
    SamplingForm,
    SamplingWorkspace,
    choose_tokens,
)
from services.engine.core.kernels.triton import why_not
from services.engine.core.kernels.triton.sampling_row import (
    BIAS,
    arrives_last,
    bound_for_count,
    bound_for_mass,
    draw,
    gather,
    load_blocks,
    ordered,
    scan,
    unpack_best,
    weights,
)
from services.engine.core.kernels.triton.specialisation import Specialisation

_TEMPERATURE = tl.constexpr(int(Column.TEMPERATURE))
_TOP_K = tl.constexpr(int(Column.TOP_K))
_TOP_P = tl.constexpr(int(Column.TOP_P))
_LOG_MIN_P = tl.constexpr(int(Column.LOG_MIN_P))
_UNIFORM = tl.constexpr(int(Column.UNIFORM))
_GIVEN = tl.constexpr(int(Column.GIVEN))

TILE_BLOCKS = 16  # 16 logits a thread of four warps: four loads of 16 bytes under way
GATHER_TILE = 2048
# Enough for every SM of a large card to have several.
_PROGRAMS = 528

# What `tallies` adds up.
_COUNT = tl.constexpr(0)
_MASS = tl.constexpr(1)
_MASS_BEFORE = tl.constexpr(2)


@jit(do_not_specialize=["columns", "tiles"])
def choose_kernel(  # type: ignore[no-untyped-def]
    logits,
    parameters,
    chosen,
    maxima,
    masses,
    best,
    arrivals,
    bounds,
    columns,
    vocab,
    stride,
    tiles,
    draws: tl.constexpr,
    filters: tl.constexpr,
    gives: tl.constexpr,
    num_blocks: tl.constexpr,
    tile_size: tl.constexpr,
    block_size: tl.constexpr,
):
    """Grid: rows, parts of `tiles` tiles. Writes the token of every row but of those with filters,
    whose largest logit, mass and least candidate are written to `bounds`."""
    row = tl.program_id(0)
    logits += row.to(tl.int64) * stride
    maxima += row * tl.cdiv(vocab, block_size)
    masses += row * tl.cdiv(vocab, block_size)
    divisor = tl.full((), 1.0, tl.float32)
    temperature = divisor * 0.0
    if draws:
        temperature = tl.load(parameters + _TEMPERATURE * columns + row).to(tl.float32)
        divisor = tl.where(temperature > 0.0, temperature, 1.0)
    first_tile = tl.program_id(1) * tiles
    packed = scan(
        logits, divisor, maxima, masses, vocab, first_tile, tiles, draws, tile_size, block_size
    )
    tl.atomic_max(best + row, packed, sem="relaxed")
    if arrives_last(arrivals + row, tl.num_programs(1)):
        likeliest, fine = unpack_best(best + row)
        tl.store(chosen + columns + row, tl.where(fine, 0, 1).to(tl.int64))
        token = likeliest.to(tl.int64)
        if draws and temperature > 0.0:
            top_k = tl.load(parameters + _TOP_K * columns + row).to(tl.int32)
            top_p = tl.load(parameters + _TOP_P * columns + row)
            log_min_p = tl.load(parameters + _LOG_MIN_P * columns + row).to(tl.float32)
            uniform = tl.load(parameters + _UNIFORM * columns + row)
            peaks, peak, own, shared = load_blocks(maxima, masses, vocab, num_blocks, block_size)
            is_filtered = (top_k > 0) | (top_p < 1.0) | (log_min_p > -float("inf"))
            if filters and is_filtered:
                least = peak + log_min_p
                if top_k > 0:
                    # Top-p is a share of all that top-k keeps.
                    least = bound_for_count(peaks, peak, top_k)
                elif top_p < 1.0:
                    least = tl.maximum(
                        least, bound_for_mass(peaks, peak, shared, top_p, block_size)
                    )
                bounds += row * 3
                tl.store(bounds, peak.to(tl.float64))
                tl.store(bounds + 1, tl.sum(shared, 0).to(tl.float64))
                tl.store(bounds + 2, least.to(tl.float64))
            else:
                token = draw(
                    logits, divisor, uniform, peaks, own, shared, vocab, num_blocks, block_size
                ).to(tl.int64)
        if gives:
            given = tl.load(parameters + _GIVEN * columns + row).to(tl.int64)
            token = tl.where(given >= 0, given, token)
        tl.store(chosen + row, token)


@jit
def tallies(  # type: ignore[no-untyped-def]
    values,
    tokens,
    size,
    num_gathered,
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
    for start in range(0, size, chunk):
        place = start + tl.arange(0, chunk)
        inside = place < size
        scaled = tl.load(values + place, inside, other=-float("inf")).to(tl.float32)
        scaled = tl.div_rn(scaled, divisor)
        key = ordered(scaled).to(tl.int64) + BIAS
        amount = inside.to(tl.int64)
        if by != _COUNT:
            amount = tl.where(inside, weights(scaled, peak), 0)
        if by == _MASS_BEFORE:
            token = tl.load(tokens + place, place < num_gathered, other=0)
            token = tl.where(num_gathered > 0, token, place).to(tl.int64)
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
    num_gathered,
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
        sums = tallies(values, tokens, size, num_gathered, divisor, peak, limits, least, by, chunk)
        holds = sums <= wanted if by == _MASS_BEFORE else sums >= wanted
        # It holds up to some digit; for the first it does by what was found before.
        found += (tl.maximum(tl.sum(holds.to(tl.int64), 0), 1) - 1) << shift
    return found


@jit(do_not_specialize=["columns", "tiles"])
def filter_kernel(  # type: ignore[no-untyped-def]
    logits,
    parameters,
    chosen,
    arrivals,
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
    chunk: tl.constexpr,
):
    """Grid: rows, parts of `tiles` tiles. Writes the token of every row with filters."""
    row = tl.program_id(0)
    temperature = tl.load(parameters + _TEMPERATURE * columns + row).to(tl.float32)
    top_k = tl.load(parameters + _TOP_K * columns + row).to(tl.int64)
    top_p = tl.load(parameters + _TOP_P * columns + row)
    log_min_p = tl.load(parameters + _LOG_MIN_P * columns + row).to(tl.float32)
    is_filtered = (top_k > 0) | (top_p < 1.0) | (log_min_p > -float("inf"))
    is_wanted = (temperature > 0.0) & is_filtered
    if gives:
        is_wanted = is_wanted & (tl.load(parameters + _GIVEN * columns + row) < 0)
    if is_wanted:
        logits += row.to(tl.int64) * stride
        candidates += row * capacity
        candidate_tokens += row * capacity
        least = tl.load(bounds + row * 3 + 2).to(tl.float32)
        first_tile = tl.program_id(1) * tiles
        gather(
            logits,
            temperature,
            least,
            candidates,
            candidate_tokens,
            found + row,
            vocab,
            first_tile,
            tiles,
            tile_size,
            capacity,
        )
        if arrives_last(arrivals + row, tl.num_programs(1)):
            size = tl.atomic_xchg(found + row, 0)
            num_gathered = size
            values = candidates
            if size > capacity:
                num_gathered = 0
                values = logits
                size = vocab
            peak = tl.load(bounds + row * 3).to(tl.float32)
            floor = tl.zeros((), tl.int64)
            if top_k > 0:
                floor = search(
                    values,
                    candidate_tokens,
                    size,
                    num_gathered,
                    temperature,
                    peak,
                    top_k,
                    floor,
                    _COUNT,
                    33,
                    chunk,
                )
            if top_p < 1.0:
                mass = tl.load(bounds + row * 3 + 1)
                if top_k > 0:
                    limits = tl.zeros((8,), tl.int64) + floor
                    sums = tallies(
                        values,
                        candidate_tokens,
                        size,
                        num_gathered,
                        temperature,
                        peak,
                        limits,
                        floor,
                        _MASS,
                        chunk,
                    )
                    mass = tl.max(sums, 0).to(tl.float64)
                wanted = tl.maximum(tl.ceil(top_p * mass).to(tl.int64), 1)
                nucleus = search(
                    values,
                    candidate_tokens,
                    size,
                    num_gathered,
                    temperature,
                    peak,
                    wanted,
                    floor,
                    _MASS,
                    33,
                    chunk,
                )
                floor = tl.maximum(floor, nucleus)
            floor = tl.maximum(floor, ordered(peak + log_min_p).to(tl.int64) + BIAS)
            limits = tl.zeros((8,), tl.int64) + floor
            sums = tallies(
                values,
                candidate_tokens,
                size,
                num_gathered,
                temperature,
                peak,
                limits,
                floor,
                _MASS,
                chunk,
            )
            mass = tl.max(sums, 0)
            uniform = tl.load(parameters + _UNIFORM * columns + row)
            target = tl.minimum((uniform * mass.to(tl.float64)).to(tl.int64), mass - 1)
            token = search(
                values,
                candidate_tokens,
                size,
                num_gathered,
                temperature,
                peak,
                target,
                floor,
                _MASS_BEFORE,
                24,
                chunk,
            )
            tl.store(chosen + row, tl.minimum(token, vocab - 1))


def parts_of(rows: int, vocab: int, tile: int) -> tuple[int, int]:
    """Programs that share a row, and tiles for each."""
    tiles = cdiv(vocab, tile)
    each = cdiv(tiles, min(tiles, cdiv(_PROGRAMS, rows)))
    return cdiv(tiles, each), each


@choose_tokens.implementation("cuda", name="triton", unavailable=why_not)
def choose_tokens_triton(
    logits: Tensor,
    parameters: Tensor,
    chosen: Tensor,
    form: SamplingForm,
    workspace: SamplingWorkspace,
) -> None:
    """One kernel, or two where a row has filters, for every 512 rows."""
    if logits.stride(-1) != 1 or logits.dtype != torch.float32 or logits.shape[1] >= 2**24:
        choose_tokens.reference(logits, parameters, chosen, form, workspace)
        return
    for lot in lots(len(logits), workspace):
        _choose(logits[lot], parameters[:, lot], chosen[:, lot], form, workspace)


def lots(rows: int, workspace: SamplingWorkspace) -> Iterator[slice]:
    """Rows that the workspace has room for."""
    size = len(workspace.best)
    for start in range(0, rows, size):
        yield slice(start, min(start + size, rows))


def _choose(
    logits: Tensor,
    parameters: Tensor,
    chosen: Tensor,
    form: SamplingForm,
    workspace: SamplingWorkspace,
) -> None:
    rows, vocab = logits.shape
    parts, tiles = parts_of(rows, vocab, TILE_BLOCKS * BLOCK)
    choose_kernel[(rows, parts)](
        logits,
        parameters,
        chosen,
        workspace.maxima,
        workspace.masses,
        workspace.best,
        workspace.arrivals,
        workspace.bounds,
        chosen.stride(0),
        vocab,
        logits.stride(0),
        tiles,
        draws=form.draws,
        filters=form.filters,
        gives=form.gives,
        num_blocks=next_power_of_2(cdiv(vocab, BLOCK)),
        tile_size=TILE_BLOCKS,
        block_size=BLOCK,
    )
    if not form.filters:
        return
    parts, tiles = parts_of(rows, vocab, GATHER_TILE)
    filter_kernel[(rows, parts)](
        logits,
        parameters,
        chosen,
        workspace.arrivals,
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
        chunk=512,
    )


def _compiled() -> tuple[Specialisation, ...]:
    row = {"logits": "*fp32", "parameters": "*fp64", "chosen": "*i64", "arrivals": "*i32"}
    row |= {"bounds": "*fp64", "columns": "i32", "tiles": "i32"}
    aligned = row | {"vocab": "i32:16", "stride": "i32:16"}
    odd = row | {"vocab": "i32", "stride": "i32"}
    blocks = {"maxima": "*fp32", "masses": "*i64", "best": "*i64"}
    gathered = {"found": "*i32", "candidates": "*fp32", "candidate_tokens": "*i32"}
    forms = []
    for shape, vocab in ((aligned, 151936), (aligned, 262144), (odd, 50257)):
        sizes = {
            "num_blocks": next_power_of_2(cdiv(vocab, BLOCK)),
            "tile_size": TILE_BLOCKS,
            "block_size": BLOCK,
        }
        for draws, filters in ((False, False), (True, False), (True, True)):
            on = {"draws": draws, "filters": filters, "gives": draws}
            forms.append(Specialisation(choose_kernel, shape | blocks, sizes | on))
        sizes = {"capacity": CANDIDATES, "tile_size": GATHER_TILE, "chunk": 512, "gives": False}
        forms.append(Specialisation(filter_kernel, shape | gathered, sizes))
    return tuple(forms)


COMPILED = _compiled()
