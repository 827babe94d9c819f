"""Adapters of linear layers on plain torch, each sequence of a step going through its own."""

from __future__ import annotations

import torch
from torch import Tensor

from services.engine.core.batch import ForwardBatch
from services.engine.core.kernels import (
    AdapterParts,
    LowRankPart,
    SlottedParts,
    add_low_rank,
    add_low_ranks,
)

# As many adapters a model on a GPU can have at a time.
MAX_SLOTS = 256


class AdapterRows:
    """Which rows of the step that is being computed go through which adapter.

    Attributes:
        of: by slot, its rows, int64; where the host is to say which adapters are computed.
        slots: by row, its slot, int32, or -1; where kernels are to look.
    """

    def __init__(self) -> None:
        self.of: dict[int, Tensor] = {}
        self.slots: Tensor | None = None

    def begin(self, batch: ForwardBatch) -> None:
        """Take in a step."""
        self.of, self.slots = {}, batch.token_adapters
        if batch.adapters is None or self.slots is not None:
            return
        lengths = torch.tensor(batch.query_lengths)
        owners = torch.tensor(batch.adapters, dtype=torch.int32).repeat_interleave(lengths)
        device = batch.token_ids.device
        if device.type == "cuda":
            self.slots = owners.pin_memory().to(device, non_blocking=True)
            return
        for slot in sorted(set(batch.adapters) - {-1}):
            self.of[slot] = torch.nonzero(owners == slot).flatten()


class LinearAdapters:
    """What adapters do at one layer."""

    def __init__(self, rows: AdapterRows) -> None:
        self._rows = rows
        self._parts: dict[int, tuple[LowRankPart, ...]] = {}
        self._slotted: SlottedParts | None = None  # where kernels look at it

    def set(self, slot: int, parts: tuple[LowRankPart, ...] | None) -> None:
        """Keep an adapter's parts, or forget them."""
        if parts is None:
            self._parts.pop(slot, None)
        else:
            self._parts[slot] = parts
            if parts[0].down.is_cuda:
                self._for_kernels()
        if self._slotted is not None:
            self._slotted.set(slot, parts or ())

    def add(self, projected: Tensor, hidden: Tensor) -> Tensor:
        """Add what the step's adapters make of the layer's input, in place."""
        slots = self._rows.slots
        if slots is not None and (self._slotted is not None or self._parts):
            return add_low_ranks(projected, hidden, slots, self._for_kernels())
        for slot, rows in self._rows.of.items():
            for part in self._parts.get(slot, ()):
                add_low_rank(projected, hidden, rows, part)
        return projected

    def _for_kernels(self) -> SlottedParts:
        if self._slotted is None:
            device = next(iter(self._parts.values()))[0].down.device
            self._slotted = SlottedParts.of(MAX_SLOTS, device)
            for slot, parts in self._parts.items():
                self._slotted.set(slot, parts)
        return self._slotted


class PlacedAdapter:
    """An adapter in a weight's precision, on its device."""

    def __init__(self, parts: AdapterParts, weight: Tensor) -> None:
        def placed(values: Tensor) -> Tensor:
            return values.to(weight.device, weight.dtype)

        self.parts = {
            path: tuple(LowRankPart(placed(p.down), placed(p.up), p.first) for p in own)
            for path, own in parts.items()
        }
        if weight.is_cuda:
            # So kernels read them: made so here, beside steps.
            self.parts = {
                path: tuple(part.aligned() for part in own) for path, own in self.parts.items()
            }
        every = [part for own in self.parts.values() for part in own]
        self.num_bytes = sum(part.down.nbytes + part.up.nbytes for part in every)
