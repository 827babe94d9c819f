"""Masks, penalties, biases and bars in Triton: only the logits that they change are touched."""

from __future__ import annotations

from torch import Tensor
from triton import cdiv, jit
from triton import language as tl

from services.engine.core.kernels.sampling import (
    MASK_BITS,
    CountTable,
    DeviceEdits,
    EditKind,
    Penalties,
    edit_logits,
    mask_logits,
    penalize,
)
from services.engine.core.kernels.triton import why_not
from services.engine.core.kernels.triton.sampling_row import is_read
from services.engine.core.kernels.triton.specialisation import Specialisation

_REPETITION = tl.constexpr(int(EditKind.REPETITION))
_SUBTRACTED = tl.constexpr(int(EditKind.SUBTRACTED))
_ADDED = tl.constexpr(int(EditKind.ADDED))
_ALLOWED = tl.constexpr(int(EditKind.ALLOWED))
_BANNED = tl.constexpr(int(EditKind.BANNED))
_WORDS = 64  # of a mask, for a program: 2048 logits
_CHUNK = 1024


@jit(do_not_specialize=["num_words"])
def mask_kernel(  # type: ignore[no-untyped-def]
    logits,
    rows,
    words,
    vocab,
    stride,
    num_words,
    chunk: tl.constexpr,
    word_bits: tl.constexpr,
):
    """Grid: masks, chunks of words. Logits are not read, and written only where they are barred."""
    mask = tl.program_id(0).to(tl.int64)
    logits += tl.load(rows + mask).to(tl.int64) * stride
    place = tl.program_id(1) * chunk + tl.arange(0, chunk)
    word = tl.load(words + mask * num_words + place, place < num_words, other=-1)
    bit = tl.arange(0, word_bits)[None, :]
    token = place[:, None] * word_bits + bit
    barred = ((word[:, None] >> bit) & 1) == 0
    tl.store(logits + token, -float("inf"), barred & (token < vocab))


@jit
def _edit(logits, token_ids, numbers, start, end, kind: tl.constexpr, chunk: tl.constexpr):  # type: ignore[no-untyped-def]
    """Apply the edits of one kind to a row, in which no token has two of it."""
    for first in range(start, end, chunk):
        place = first + tl.arange(0, chunk)
        inside = place < end
        there = logits + tl.load(token_ids + place, inside, other=0)
        if kind == _BANNED:
            tl.store(there, -float("inf"), inside)
        else:
            number = tl.load(numbers + place, inside, other=1.0)
            old = tl.load(there, inside, other=0.0)
            if kind == _REPETITION:
                new = tl.where(old > 0.0, tl.div_rn(old, number), old * number)
            elif kind == _SUBTRACTED:
                new = old - number
            else:
                new = old + number
            tl.store(there, new, inside)
    # What other threads have written is read by the next kind.
    tl.debug_barrier()


@jit
def _keep_allowed(logits, token_ids, numbers, start, end, vocab, chunk: tl.constexpr):  # type: ignore[no-untyped-def]
    """Set all logits of a row to -Inf but those that are allowed, whose numbers hold them
    meanwhile."""
    for first in range(start, end, chunk):
        place = first + tl.arange(0, chunk)
        there = logits + tl.load(token_ids + place, place < end, other=0)
        tl.store(numbers + place, tl.load(there, place < end), place < end)
    tl.debug_barrier()
    for first in range(0, vocab, chunk):
        token = first + tl.arange(0, chunk)
        tl.store(logits + token, -float("inf"), token < vocab)
    tl.debug_barrier()
    for first in range(start, end, chunk):
        place = first + tl.arange(0, chunk)
        there = logits + tl.load(token_ids + place, place < end, other=0)
        tl.store(there, tl.load(numbers + place, place < end), place < end)
    tl.debug_barrier()


@jit(do_not_specialize=["edited"])
def edit_kernel(  # type: ignore[no-untyped-def]
    logits,
    rows,
    offsets,
    token_ids,
    numbers,
    edited,
    vocab,
    stride,
    chunk: tl.constexpr,
):
    """Grid: edited rows. A program applies all kinds to its row, one after the other."""
    index = tl.program_id(0)
    logits += tl.load(rows + index).to(tl.int64) * stride
    offsets += index
    count = edited + 1
    for kind in tl.static_range(_REPETITION, _ALLOWED):
        start = tl.load(offsets + kind * count)
        end = tl.load(offsets + kind * count + 1)
        _edit(logits, token_ids, numbers, start, end, kind, chunk)
    start = tl.load(offsets + _ALLOWED * count)
    end = tl.load(offsets + _ALLOWED * count + 1)
    if start < end:
        _keep_allowed(logits, token_ids, numbers, start, end, vocab, chunk)
    start = tl.load(offsets + _BANNED * count)
    end = tl.load(offsets + _BANNED * count + 1)
    _edit(logits, token_ids, numbers, start, end, _BANNED, chunk)


@jit(do_not_specialize=["penalised", "num_changes"])
def penalize_kernel(  # type: ignore[no-untyped-def]
    logits,
    numbers,
    rows,
    ends,
    changed,
    latest,
    ids,
    in_output,
    penalised,
    num_changes,
    places,
    stride,
    chunk: tl.constexpr,
):
    """Grid: penalised rows. A program brings the slot of its row up to date, then goes over it."""
    index = tl.program_id(0)
    logits += tl.load(rows + index).to(tl.int64) * stride
    slot = tl.load(rows + penalised + index).to(tl.int64)
    size = tl.load(rows + 2 * penalised + index)
    ids += slot * places
    in_output += slot * places
    end = tl.load(ends + index + 1)
    for first in range(tl.load(ends + index), end, chunk):
        change = first + tl.arange(0, chunk)
        inside = change < end
        place = tl.load(changed + change, inside, other=0)
        tl.store(ids + place, tl.load(changed + num_changes + change, inside), inside)
        tl.store(in_output + place, tl.load(changed + 2 * num_changes + change, inside), inside)
    tl.debug_barrier()
    repetition = tl.load(numbers + index).to(tl.float32)
    presence = tl.load(numbers + penalised + index)
    frequency = tl.load(numbers + 2 * penalised + index)
    said = tl.load(rows + 3 * penalised + index)
    token = tl.load(latest + said, said >= 0, other=-1).to(tl.int32)
    is_new = said >= 0
    for first in range(0, size, chunk):
        place = first + tl.arange(0, chunk)
        inside = place < size
        known = tl.load(ids + place, inside, other=0)
        again = inside & (known == token)
        is_new = is_new & (tl.sum(again.to(tl.int32), 0) == 0)
        count = tl.load(in_output + place, inside, other=0) + again.to(tl.int32)
        old = tl.load(logits + known, inside, other=0.0)
        new = _penalized(old, count, repetition, presence, frequency)
        tl.store(logits + known, new, inside)
    if is_new:
        old = tl.load(logits + token)
        tl.store(
            logits + token, _penalized(old, is_new.to(tl.int32), repetition, presence, frequency)
        )


@jit
def _penalized(old, count, repetition, presence, frequency):  # type: ignore[no-untyped-def]
    """Logits of tokens that are so often in the output."""
    new = tl.where(old > 0.0, tl.div_rn(old, repetition), old * repetition)
    # In float64 first, as on the host.
    subtracted = (presence + frequency * count.to(tl.float64)).to(tl.float32)
    return new - tl.where(count > 0, subtracted, 0.0)


@mask_logits.implementation("cuda", name="triton", unavailable=why_not)
def mask_logits_triton(logits: Tensor, rows: Tensor, words: Tensor) -> None:
    """A program for 2048 logits of a mask."""
    if not is_read(logits):
        mask_logits.reference(logits, rows, words)
        return
    masks, num_words = words.shape
    mask_kernel[(masks, cdiv(num_words, _WORDS))](
        logits,
        rows,
        words,
        logits.shape[1],
        logits.stride(0),
        num_words,
        chunk=_WORDS,
        word_bits=MASK_BITS,
    )


@edit_logits.implementation("cuda", name="triton", unavailable=why_not)
def edit_logits_triton(logits: Tensor, edits: DeviceEdits) -> None:
    """A program for each edited row."""
    if not is_read(logits):
        edit_logits.reference(logits, edits)
        return
    edited = len(edits.rows)
    edit_kernel[(edited,)](
        logits,
        edits.rows,
        edits.offsets,
        edits.token_ids,
        edits.numbers,
        edited,
        logits.shape[1],
        logits.stride(0),
        chunk=_CHUNK,
    )


@penalize.implementation("cuda", name="triton", unavailable=why_not)
def penalize_triton(logits: Tensor, penalties: Penalties, table: CountTable) -> None:
    """A program for each penalised row."""
    if not is_read(logits):
        penalize.reference(logits, penalties, table)
        return
    penalised = penalties.rows.shape[1]
    penalize_kernel[(penalised,)](
        logits,
        penalties.numbers,
        penalties.rows,
        penalties.ends,
        penalties.changed,
        penalties.latest,
        table.ids,
        table.in_output,
        penalised,
        penalties.changed.shape[1],
        table.ids.shape[1],
        logits.stride(0),
        chunk=_CHUNK,
    )


def _compiled() -> tuple[Specialisation, ...]:
    forms = []
    for numbers in ("i32:16", "i32"):
        row = {"logits": "*fp32", "rows": "*i32", "vocab": numbers, "stride": numbers}
        masks = row | {"words": "*i32", "num_words": "i32"}
        forms.append(Specialisation(mask_kernel, masks, {"chunk": _WORDS, "word_bits": MASK_BITS}))
        edits = row | {"offsets": "*i32", "token_ids": "*i32", "numbers": "*fp32", "edited": "i32"}
        forms.append(Specialisation(edit_kernel, edits, {"chunk": _CHUNK}))
        counts = dict.fromkeys(("rows", "ends", "changed", "ids", "in_output"), "*i32")
        counts |= {"logits": "*fp32", "numbers": "*fp64", "places": "i32:16", "stride": numbers}
        counts |= {"penalised": "i32", "num_changes": "i32", "latest": "*i64"}
        forms.append(Specialisation(penalize_kernel, counts, {"chunk": _CHUNK}))
    return tuple(forms)


COMPILED = _compiled()
