"""Edits of logits as they are sent to a device."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from services.engine.core.kernels.sampling import EditKind
from services.engine.core.logit_edits import LogitEdits


@dataclass(frozen=True, slots=True)
class PackedEdits:
    """`DeviceEdits` on the host. Those of unknown tokens are given to token 0: their rows fail."""

    rows: npt.NDArray[np.int32]
    offsets: npt.NDArray[np.int32]
    token_ids: npt.NDArray[np.int32]
    numbers: npt.NDArray[np.float32]
    unknown_rows: list[int]


def pack_edits(edits: LogitEdits, vocab_size: int, *, without_counted: int = -1) -> PackedEdits:
    """Bring edits, but for those of `edits.counted(without_counted)`, into the form that a device
    applies."""
    by_kind = edits.by_kind(without_counted=without_counted)
    kinds = [by_kind.get(kind.name.lower()) for kind in EditKind]
    some = [numbers for numbers in kinds if numbers is not None]
    if not some:
        nothing = np.empty(0, np.int32)
        offsets = np.zeros((len(EditKind), 1), np.int32)
        return PackedEdits(nothing, offsets, nothing, np.empty(0, np.float32), [])
    rows = np.unique(np.concatenate([numbers.rows for numbers in some]))
    token_ids = np.concatenate([numbers.token_ids for numbers in some]).astype(np.int32)
    values = np.concatenate([numbers.numbers for numbers in some])
    all_rows = np.concatenate([numbers.rows for numbers in some])
    known = token_ids.view(np.uint32) < vocab_size
    unknown_rows: list[int] = []
    if not known.all():
        unknown_rows = np.unique(all_rows[~known]).tolist()
        token_ids = np.where(known, token_ids, 0)
    offsets = np.zeros((len(EditKind), len(rows) + 1), np.int32)
    start = 0
    for kind, numbers in zip(EditKind, kinds, strict=True):
        if numbers is not None:
            offsets[kind, :-1] = np.searchsorted(numbers.rows, rows)
            offsets[kind, -1] = len(numbers.rows)
            offsets[kind] += start
            start += len(numbers.rows)
    return PackedEdits(rows.astype(np.int32), offsets, token_ids, values, unknown_rows)
