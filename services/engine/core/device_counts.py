"""The tokens that sequences hold, counted on the device that penalises them.

The counts of a sequence of 1500 distinct tokens are 12 KB, and a step changes one of them. For 256
such sequences edits of all tokens are 4 MB, and 33 ms of the host were measured to pack them; what
changes is 13 KB, in under 1 ms. So a device keeps a copy, `CountTable`, which every step brings up
to date.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from services.engine.core.kernels.sampling import CountTable
from services.engine.core.logit_edits import CountedRow
from services.engine.core.token_counts import TokenCounts

# Longer ones are counted by the host: 512 sequences take up to 32 MB.
MOST_DISTINCT = 8192
_LEAST_SLOTS = 8
_LEAST_PLACES = 256


class DeviceCounts:
    """The copies of all running sequences, by their rows."""

    def __init__(self, device: torch.device) -> None:
        self._ids = torch.zeros(0, 0, dtype=torch.int32, device=device)
        self._in_output = self._ids
        self._owners: list[TokenCounts | None] = []
        self._taken: list[int] = []
        self._packed: list[CountedRow] = []

    @property
    def table(self) -> CountTable:
        """The copies, as they are when all steps before have run."""
        return CountTable(self._ids, self._in_output)

    def pack(self, counted: list[CountedRow]) -> tuple[npt.NDArray[np.int32], tuple[int, ...]]:
        """What a step sends to penalise rows, none of whose sequences comes twice: the arrays of a
        `Penalties` but for `latest`, one after the other as they are declared, and where each but
        the first begins. It is sent again until `note_sent` is called.
        """
        self._make_room(counted)
        numbers, rows, ends = [], [], [0]
        places: list[int] = []
        token_ids: list[int] = []
        in_output: list[int] = []
        for each in counted:
            sequence, counts = each.sequence, each.counts
            sampling, slot = sequence.sampling, sequence.row
            numbers.append(
                (
                    sampling.repetition_penalty,
                    sampling.presence_penalty,
                    sampling.frequency_penalty,
                )
            )
            rows.append((each.row, slot, counts.num_distinct, each.said))
            known = self._taken[slot] if self._owners[slot] is counts else 0
            changed = counts.changed(sequence.token_ids, known)
            for kept, new in zip((places, token_ids, in_output), changed, strict=True):
                kept += new
            ends.append(len(places))
        self._packed = counted
        parts = [
            np.ascontiguousarray(np.array(numbers).T).view(np.int32),
            np.array(rows, np.int32).T,
            np.array(ends, np.int32),
            np.array((places, token_ids, in_output), np.int32),
        ]
        begins = np.cumsum([part.size for part in parts[:-1]])
        return np.concatenate([part.ravel() for part in parts]), tuple(begins.tolist())

    def note_sent(self) -> None:
        """Note that the device has been told to bring its table up to what was last packed."""
        for each in self._packed:
            slot = each.sequence.row
            self._owners[slot], self._taken[slot] = each.counts, each.counts.num_taken
        self._packed = []

    def _make_room(self, counted: list[CountedRow]) -> None:
        slots = max(each.sequence.row for each in counted) + 1
        places = max(each.counts.num_distinct for each in counted)
        had_slots, had_places = self._ids.shape
        if slots <= had_slots and places <= had_places:
            return
        shape = (
            max(had_slots, _LEAST_SLOTS, _power_of_2(slots)),
            max(had_places, _LEAST_PLACES, _power_of_2(places)),
        )
        self._ids = _grown(self._ids, shape)
        self._in_output = _grown(self._in_output, shape)
        self._owners += [None] * (shape[0] - had_slots)
        self._taken += [0] * (shape[0] - had_slots)


def _power_of_2(number: int) -> int:
    return 1 << (number - 1).bit_length()


def _grown(table: Tensor, shape: tuple[int, int]) -> Tensor:
    larger = torch.zeros(shape, dtype=table.dtype, device=table.device)
    larger[: table.shape[0], : table.shape[1]] = table
    return larger
