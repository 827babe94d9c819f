"""Log-probabilities in Triton: the pass that finds the mass of a row, and one for its likeliest.

As in kernels/triton/sampling.py, the largest of the blocks bound the likeliest logits from below,
so that few have to be gathered; they are then taken out one after the other.
"""

from __future__ import annotations

from torch import Tensor
from triton import cdiv, jit, next_power_of_2
from triton import language as tl

from services.engine.core.kernels.sampling import (
    BLOCK,
    CANDIDATES,
    Column,
    SamplingForm,
    SamplingWorkspace,
    report_logprobs,
)
from services.engine.core.kernels.triton import why_not
from services.engine.core.kernels.triton.sampling import TILE_BLOCKS, lots
from services.engine.core.kernels.triton.sampling_filters import GATHER_TILE
from services.engine.core.kernels.triton.sampling_row import (
    BIAS,
    OF_NAN,
    UNIT,
    arrives_last,
    bound_for_count,
    gather,
    is_read,
    load_blocks,
    ordered,
    own_of,
    parts_of,
    scan,
)
from services.engine.core.kernels.triton.specialisation import Specialisation

_LOGPROBS = tl.constexpr(int(Column.LOGPROBS))
_CHUNK = 1024


@jit(do_not_specialize=["columns", "tiles"])
def mass_kernel(  # type: ignore[no-untyped-def]
    logits,
    parameters,
    tokens,
    reports,
    maxima,
    masses,
    arrivals,
    bounds,
    columns,
    vocab,
    stride,
    tiles,
    num_blocks: tl.constexpr,
    tile_size: tl.constexpr,
    block_size: tl.constexpr,
):
    """Grid: rows, parts of `tiles` tiles. Writes the log-probability of the token of every row that
    reports any; to `bounds` the logarithm of the row's mass, and a value that as many logits reach
    as it reports."""
    row = tl.program_id(0)
    wanted = tl.load(parameters + _LOGPROBS * columns + row).to(tl.int32)
    if wanted >= 0:
        logits, maxima, masses = own_of(row, logits, maxima, masses, vocab, stride, block_size)
        first_tile = tl.program_id(1) * tiles
        scan(logits, None, maxima, masses, vocab, first_tile, tiles, True, tile_size, block_size)
        if arrives_last(arrivals + row, tl.num_programs(1)):
            peaks, peak, _, shared = load_blocks(maxima, masses, vocab, num_blocks, block_size)
            log_mass = peak + tl.log(tl.sum(shared, 0).to(tl.float32) / UNIT)
            token = tl.minimum(tl.load(tokens + row), vocab - 1)
            own = tl.load(logits + token).to(tl.float32) - log_mass
            tl.store(reports + row, own.to(tl.float64))
            tl.store(bounds + row * 3 + 1, log_mass.to(tl.float64))
            least = bound_for_count(peaks, peak, wanted)
            tl.store(bounds + row * 3 + 2, least.to(tl.float64))


@jit(do_not_specialize=["columns", "tiles", "most"])
def likeliest_kernel(  # type: ignore[no-untyped-def]
    logits,
    parameters,
    reports,
    arrivals,
    found,
    bounds,
    candidates,
    candidate_tokens,
    columns,
    vocab,
    stride,
    tiles,
    most,
    capacity: tl.constexpr,
    tile_size: tl.constexpr,
    chunk: tl.constexpr,
):
    """Grid: rows, parts of `tiles` tiles. Writes the likeliest tokens of every row that reports
    any, and their log-probabilities: -Inf where there are no more."""
    row = tl.program_id(0)
    wanted = tl.load(parameters + _LOGPROBS * columns + row).to(tl.int32)
    if wanted > 0:
        logits += row.to(tl.int64) * stride
        candidates += row * capacity
        candidate_tokens += row * capacity
        least = tl.load(bounds + row * 3 + 2).to(tl.float32)
        first_tile = tl.program_id(1) * tiles
        gather(
            logits,
            None,
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
            log_mass = tl.load(bounds + row * 3 + 1).to(tl.float32)
            above = tl.full((), 2**63 - 1, tl.int64)
            for number in range(tl.minimum(wanted, most)):
                # The largest below the one before; of those that tie, the first token.
                best = tl.zeros((chunk,), tl.int64)
                for start in range(0, size, chunk):
                    place = start + tl.arange(0, chunk)
                    value = tl.load(values + place, place < size, other=-float("inf"))
                    token = tl.load(candidate_tokens + place, place < num_gathered, other=0)
                    token = tl.where(num_gathered > 0, token, place)
                    key = ordered(value.to(tl.float32)).to(tl.int64) + BIAS
                    packed = (key << 31) + (token ^ OF_NAN)
                    best = tl.maximum(best, tl.where((place < size) & (packed < above), packed, 0))
                above = tl.max(best, 0)
                token = (above & OF_NAN) ^ OF_NAN
                inside = above > 0
                value = tl.load(logits + token, inside, other=-float("inf")).to(tl.float32)
                tl.store(reports + (1 + number) * columns + row, token.to(tl.float64))
                logprob = (value - log_mass).to(tl.float64)
                tl.store(reports + (1 + most + number) * columns + row, logprob)


@report_logprobs.implementation("cuda", name="triton", unavailable=why_not)
def report_logprobs_triton(
    logits: Tensor,
    parameters: Tensor,
    tokens: Tensor,
    reports: Tensor,
    form: SamplingForm,
    workspace: SamplingWorkspace,
) -> None:
    """One kernel, or two where a row reports the likeliest tokens, for every 512 rows."""
    if not is_read(logits):
        report_logprobs.reference(logits, parameters, tokens, reports, form, workspace)
        return
    for lot in lots(len(logits), workspace):
        _report(logits[lot], parameters[:, lot], tokens[lot], reports[:, lot], form, workspace)


def _report(
    logits: Tensor,
    parameters: Tensor,
    tokens: Tensor,
    reports: Tensor,
    form: SamplingForm,
    workspace: SamplingWorkspace,
) -> None:
    rows, vocab = logits.shape
    parts, tiles = parts_of(rows, vocab, TILE_BLOCKS * BLOCK)
    mass_kernel[(rows, parts)](
        logits,
        parameters,
        tokens,
        reports,
        workspace.maxima,
        workspace.masses,
        workspace.arrivals,
        workspace.bounds,
        reports.stride(0),
        vocab,
        logits.stride(0),
        tiles,
        num_blocks=next_power_of_2(cdiv(vocab, BLOCK)),
        tile_size=TILE_BLOCKS,
        block_size=BLOCK,
    )
    if form.most_logprobs == 0:
        return
    parts, tiles = parts_of(rows, vocab, GATHER_TILE)
    likeliest_kernel[(rows, parts)](
        logits,
        parameters,
        reports,
        workspace.arrivals,
        workspace.found,
        workspace.bounds,
        workspace.candidates,
        workspace.candidate_tokens,
        reports.stride(0),
        vocab,
        logits.stride(0),
        tiles,
        form.most_logprobs,
        capacity=CANDIDATES,
        tile_size=GATHER_TILE,
        chunk=_CHUNK,
    )


def _compiled() -> tuple[Specialisation, ...]:
    row = {"logits": "*fp32", "parameters": "*fp64", "reports": "*fp64", "arrivals": "*i32"}
    row |= {"bounds": "*fp64", "columns": "i32", "tiles": "i32"}
    mass = row | {"tokens": "*i64", "maxima": "*fp32", "masses": "*i64"}
    top = row | {"found": "*i32", "candidates": "*fp32", "candidate_tokens": "*i32", "most": "i32"}
    forms = []
    for numbers, vocab in (("i32:16", 151936), ("i32", 50257)):
        shape = {"vocab": numbers, "stride": numbers}
        sizes = {"num_blocks": next_power_of_2(cdiv(vocab, BLOCK)), "block_size": BLOCK}
        forms.append(Specialisation(mass_kernel, mass | shape, sizes | {"tile_size": TILE_BLOCKS}))
        sizes = {"capacity": CANDIDATES, "tile_size": GATHER_TILE, "chunk": _CHUNK}
        forms.append(Specialisation(likeliest_kernel, top | shape, sizes))
    return tuple(forms)


COMPILED = _compiled()
