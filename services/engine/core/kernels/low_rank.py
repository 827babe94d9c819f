"""Low-rank adapters: what a small pair of matrices adds to a projection."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TypeAlias

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
