"""Low-rank adapters: what a small pair of matrices adds to a projection."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TypeAlias

import torch
from torch import Tensor
from torch.nn import functional

from services.engine.core.kernels.registry import declare


@dataclass(frozen=True, slots=True)
class LowRankPart:
    """What an adapter adds to some outputs of a projection: up * (down * input).

    Attributes:
        down: [rank, inputs].
        up: [outputs, rank], the adapter's scale included.
        first: the first of the projection's outputs that it is added to.
    """

    down: Tensor
    up: Tensor
    first: int

    def aligned(self) -> LowRankPart:
        """The same with a rank that is a multiple of RANK_MULTIPLE: the rows and columns beyond its
        own are zeros."""
        missing = -len(self.down) % RANK_MULTIPLE
        down, up = self.down.contiguous(), self.up.contiguous()
        if missing:
            down, up = functional.pad(down, (0, 0, 0, missing)), functional.pad(up, (0, missing))
        return LowRankPart(down, up, self.first)

    def split(self, at: int) -> tuple[LowRankPart, ...]:
        """The same as parts of which none has outputs before and behind the one at `at`."""
        end = self.first + len(self.up)
        if end <= at or at <= self.first:
            return (self,)
        before = at - self.first
        return (
            LowRankPart(self.down, self.up[:before], self.first),
            LowRankPart(self.down, self.up[before:], at),
        )


# What an adapter does, by the path of each module of a model that it changes.
AdapterParts: TypeAlias = Mapping[str, tuple[LowRankPart, ...]]


@declare
def add_low_rank(projected: Tensor, hidden: Tensor, rows: Tensor, part: LowRankPart) -> Tensor:
    """Add to some rows of a projection, in place, what an adapter makes of its input (Hu et al.,
    arXiv:2106.09685).

    projected: [num_tokens, outputs]; hidden: [num_tokens, inputs]; rows: int64. Returns
    `projected`.
    """
    added = functional.linear(functional.linear(hidden[rows], part.down), part.up)
    projected[rows, part.first : part.first + len(part.up)] += added
    return projected


# Adapters whose ranks are multiples of this are read 16 bytes at a time.
RANK_MULTIPLE = 16
# An adapter that changes the parts of a merged projection has one pair of matrices for each, and
# no model merges more.
MAX_PARTS = 4
_FIELDS = 5


@dataclass(eq=False, slots=True)
class SlottedParts:
    """What adapters do at one projection, by the slots that tokens name them by, for kernels that
    are told on the device which token has which.

    Attributes:
        parts: by slot, for the reference.
        table: [slots, MAX_PARTS, 5] int64 on the device: the addresses of `down` and `up`, the
            rank, the first output and how many there are. A rank of 0 is no part. It is written to
            when an adapter comes or goes, between steps, and stays where it is.
        max_rank: what none of the ranks that have been there exceeds. A step that was captured
            serves those up to what it was then.
    """

    table: Tensor
    parts: dict[int, tuple[LowRankPart, ...]] = field(default_factory=dict)
    max_rank: int = 0

    @classmethod
    def of(cls, num_slots: int, device: torch.device) -> SlottedParts:
        """Of as many slots at most, empty."""
        table = torch.zeros((num_slots, MAX_PARTS, _FIELDS), dtype=torch.int64, device=device)
        return cls(table)

    def set(self, slot: int, parts: tuple[LowRankPart, ...]) -> None:
        """Keep an adapter's parts under a slot; none: forget what is there."""
        assert len(parts) <= MAX_PARTS, f"{len(parts)} parts at one projection"
        self.parts.pop(slot, None)
        rows = torch.zeros((MAX_PARTS, _FIELDS), dtype=torch.int64)
        if parts:
            self.parts[slot] = parts = tuple(part.aligned() for part in parts)
            self.max_rank = max(self.max_rank, *(len(part.down) for part in parts))
        for row, part in zip(rows, parts, strict=False):
            down, up = part.down, part.up
            fields = down.data_ptr(), up.data_ptr(), len(down), part.first, len(up)
            row.copy_(torch.tensor(fields))
        if self.table.is_cuda:
            rows = rows.pin_memory()
        self.table[slot].copy_(rows, non_blocking=True)


@declare
def add_low_ranks(
    projected: Tensor, hidden: Tensor, slots: Tensor, adapters: SlottedParts
) -> Tensor:
    """Add to a projection, in place, what each token's adapter makes of its input (Chen et al.,
    arXiv:2310.18547; Sheng et al., arXiv:2311.03285).

    projected: [num_tokens, outputs]; hidden: [num_tokens, inputs]; slots: [num_tokens] int32, -1
    for tokens without an adapter. Returns `projected`.
    """
    for slot, parts in adapters.parts.items():
        rows = torch.nonzero(slots == slot).flatten()
        for part in parts:
            add_low_rank.reference(projected, hidden, rows, part)
    return projected
