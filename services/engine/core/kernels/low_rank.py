"""Low-rank adapters: what a small pair of matrices adds to a projection."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TypeAlias

import numpy as np
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
_FIELDS = 5


@dataclass(eq=False, slots=True)
class SlottedParts:
    """What adapters do at one projection, by the slots that tokens name them by, for kernels that
    are told on the device which token has which.

    Attributes:
        table: [slots, parts, 5] int64 on the device: the addresses of `down` and `up`, the rank,
            the first output and how many there are. A rank of 0 is no part.
        max_rank: what no rank exceeds. It and the shape of the table are all that launches depend
            on, so that a step that was captured serves whatever adapter comes later.
        parts: by slot, for the reference.
    """

    table: Tensor
    max_rank: int
    parts: dict[int, tuple[LowRankPart, ...]] = field(default_factory=dict)


class AdapterTable:
    """What adapters do at all projections of a model.

    It is written to when an adapter comes or goes, between steps and in one transfer, and stays
    where it is.

    Attributes:
        at: by projection.
    """

    def __init__(
        self, num_slots: int, max_rank: int, num_parts: Sequence[int], device: torch.device
    ) -> None:
        """For so many adapters at a time. num_parts: by projection, how many pairs of matrices an
        adapter has there at most: one for each part of a merged projection."""
        shape = (num_slots, sum(num_parts), _FIELDS)
        self._table = torch.zeros(shape, dtype=torch.int64, device=device)
        views = torch.split(self._table, [*num_parts], dim=1)
        padded = -(-max_rank // RANK_MULTIPLE) * RANK_MULTIPLE
        self.at = tuple(SlottedParts(view, padded) for view in views)

    def set(self, slot: int, parts: Sequence[tuple[LowRankPart, ...]]) -> None:
        """Keep what an adapter does at each projection, perhaps nothing; or forget what is there.

        Steps that were launched before read what was there.
        """
        rows = np.zeros(self._table.shape[1:], np.int64)
        begin = 0
        for slotted, own in zip(self.at, parts, strict=True):
            slotted.parts.pop(slot, None)
            if own:
                slotted.parts[slot] = own = tuple(part.aligned() for part in own)
            for index, part in enumerate(own):
                rank, end = len(part.down), part.first + len(part.up)
                assert rank <= slotted.max_rank, f"a rank of {rank}, of {slotted.max_rank} at most"
                assert index < slotted.table.shape[1], f"{len(own)} parts at one projection"
                down, up = part.down.data_ptr(), part.up.data_ptr()
                rows[begin + index] = down, up, rank, part.first, end - part.first
            begin += slotted.table.shape[1]
        there = torch.from_numpy(rows)
        if self._table.is_cuda:
            there = there.pin_memory()
        self._table[slot].copy_(there, non_blocking=True)


@declare
def group_by_adapter(slots: Tensor) -> Tensor:
    """Put tokens of the same adapter together, once for all projections of a step.

    slots: [num_tokens] int32, of each token's adapter, -1 for tokens without one. Returns [2,
    num_tokens] int32: the tokens in the order of their slots, those without behind all others, and
    the slots in that order.
    """
    last = torch.iinfo(slots.dtype).max
    order = slots.masked_fill(slots < 0, last).argsort(stable=True)
    return torch.stack((order.to(slots.dtype), slots[order]))


@declare
def add_low_ranks(
    projected: Tensor, hidden: Tensor, grouped: Tensor, adapters: SlottedParts
) -> Tensor:
    """Add to a projection, in place, what each token's adapter makes of its input (Chen et al.,
    arXiv:2310.18547; Sheng et al., arXiv:2311.03285).

    projected: [num_tokens, outputs]; hidden: [num_tokens, inputs]; grouped: [2, num_tokens] int32,
    as `group_by_adapter` returns it. Returns `projected`.
    """
    tokens, slots = grouped
    for slot, parts in adapters.parts.items():
        rows = tokens[slots == slot].long()
        for part in parts:
            add_low_rank.reference(projected, hidden, rows, part)
    return projected
