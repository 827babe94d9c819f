"""Choosing tokens in Triton: one pass over the logits, and another where filters are on.

The first finds the largest logit and the mass of every block of 128 logits. That is all that a
token is drawn from without filters; the mass of a block tells where to look. With filters it also
bounds from below what they keep, nearly always a few dozen to a few thousand logits of a
vocabulary; the second pass gathers these, and a program for each row finds the smallest that is
kept, exactly, three bits of it in every round. Where they are too many to gather, because the
distribution is flat, the row itself takes their place: thirteen rounds over it, by one SM.

Passes are bound by memory: at 3 TB/s an H100 reads 256 rows of 128k logits in 45 us. In that time
it has some 38 instructions for each, of which the exact division by the temperature takes ten (so
that logits tie here where they tie on a CPU), and the weight ten more.
"""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor
from triton import cdiv, jit, next_power_of_2
from triton import language as tl

from services.engine.core.kernels.sampling import (
    BLOCK,
    Column,
    SamplingForm,
    SamplingWorkspace,
    choose_tokens,
)
from services.engine.core.kernels.triton import why_not
from services.engine.core.kernels.triton.sampling_filters import filter_rows
from services.engine.core.kernels.triton.sampling_row import (
    arrives_last,
    bound_for_count,
    bound_for_mass,
    draw,
    is_read,
    load_blocks,
    own_of,
    parts_of,
    scan,
    unpack_best,
)
from services.engine.core.kernels.triton.specialisation import Specialisation

_TEMPERATURE = tl.constexpr(int(Column.TEMPERATURE))
_TOP_K = tl.constexpr(int(Column.TOP_K))
_TOP_P = tl.constexpr(int(Column.TOP_P))
_LOG_MIN_P = tl.constexpr(int(Column.LOG_MIN_P))
_UNIFORM = tl.constexpr(int(Column.UNIFORM))
_GIVEN = tl.constexpr(int(Column.GIVEN))

TILE_BLOCKS = 16  # 16 logits a thread of four warps: four loads of 16 bytes under way


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
    logits, maxima, masses = own_of(row, logits, maxima, masses, vocab, stride, block_size)
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


@choose_tokens.implementation("cuda", name="triton", unavailable=why_not)
def choose_tokens_triton(
    logits: Tensor,
    parameters: Tensor,
    chosen: Tensor,
    form: SamplingForm,
    workspace: SamplingWorkspace,
) -> None:
    """One kernel, or two where a row has filters, for every 512 rows."""
    if not is_read(logits) or logits.shape[1] >= 2**24:
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
    filter_rows(logits, parameters, chosen, form, workspace)


def _compiled() -> tuple[Specialisation, ...]:
    row = {"logits": "*fp32", "parameters": "*fp64", "bounds": "*fp64", "columns": "i32"}
    blocks = {"maxima": "*fp32", "masses": "*i64", "best": "*i64", "arrivals": "*i32"}
    blocks |= {"chosen": "*i64", "tiles": "i32"}
    forms = []
    for numbers, vocab in (("i32:16", 151936), ("i32:16", 262144), ("i32", 50257)):
        shape = row | {"vocab": numbers, "stride": numbers}
        num_blocks = next_power_of_2(cdiv(vocab, BLOCK))
        sizes = {"num_blocks": num_blocks, "tile_size": TILE_BLOCKS, "block_size": BLOCK}
        for draws, filters in ((False, False), (True, False), (True, True)):
            on = {"draws": draws, "filters": filters, "gives": draws}
            forms.append(Specialisation(choose_kernel, shape | blocks, sizes | on))
    return tuple(forms)


COMPILED = _compiled()
