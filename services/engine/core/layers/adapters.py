"""Adapters of linear layers on plain torch, each sequence of a step going through its own."""

from __future__ import annotations

import torch
from torch import Tensor

from services.engine.core.batch import ForwardBatch
from services.engine.core.kernels import AdapterParts, LowRankPart, add_low_rank


class AdapterRows:
    """Which rows of the step that is being computed go through which adapter."""

    def __init__(self) -> None:
        self.of: dict[int, Tensor] = {}

    def begin(self, batch: ForwardBatch) -> None:
        """Take in a step."""
        self.of = {}
        if batch.adapters is None:
            return
        lengths = torch.tensor(batch.query_lengths)
        owners = torch.tensor(batch.adapters).repeat_interleave(lengths)
        device = batch.token_ids.device
        for slot in sorted(set(batch.adapters) - {-1}):
            self.of[slot] = torch.nonzero(owners == slot).flatten().to(device)


class LinearAdapters:
    """What adapters do at one layer."""

    def __init__(self, rows: AdapterRows) -> None:
        self._rows = rows
        self._parts: dict[int, tuple[LowRankPart, ...]] = {}

    def set(self, slot: int, parts: tuple[LowRankPart, ...] | None) -> None:
        """Keep an adapter's parts, or forget them."""
        if parts is None:
            self._parts.pop(slot, None)
        else:
            self._parts[slot] = parts

    def add(self, projected: Tensor, hidden: Tensor) -> Tensor:
        """Add what the step's adapters make of the layer's input, in place."""
        for slot, rows in self._rows.of.items():
            for part in self._parts.get(slot, ()):
                add_low_rank(projected, hidden, rows, part)
        return projected


class PlacedAdapter:
    """An adapter in a weight's precision, on its device."""

    def __init__(self, parts: AdapterParts, weight: Tensor) -> None:
        def placed(values: Tensor) -> Tensor:
            return values.to(weight.device, weight.dtype)

        self.parts = {
            path: tuple(LowRankPart(placed(p.down), placed(p.up), p.first) for p in own)
            for path, own in parts.items()
        }
        every = [part for own in self.parts.values() for part in own]
        self.num_bytes = sum(part.down.nbytes + part.up.nbytes for part in every)
