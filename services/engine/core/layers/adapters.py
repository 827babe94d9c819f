"""Adapters of linear layers on plain torch, each sequence of a step going through its own."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from services.engine.core.batch import ForwardBatch
from services.engine.core.kernels import (
    AdapterParts,
    AdapterTable,
    LowRankPart,
    SlottedParts,
    add_low_rank,
    add_low_ranks,
    group_by_adapter,
)
from services.engine.core.kernels.low_rank import RANK_MULTIPLE

# Elements that are brought to a card at a time.
_CHUNK = 1 << 22


class AdapterRows:
    """Which rows of the step that is being computed go through which adapter.

    Attributes:
        of: by slot, its rows, int64; where the host is to say which adapters are computed.
        grouped: all rows, those of the same adapter together, as `group_by_adapter` has them; where
            kernels are to look.
    """

    def __init__(self) -> None:
        self.of: dict[int, Tensor] = {}
        self.grouped: Tensor | None = None

    @property
    def is_empty(self) -> bool:
        """Whether no row goes through any."""
        return self.grouped is None and not self.of

    def begin(self, batch: ForwardBatch) -> None:
        """Take in a step."""
        self.of, self.grouped = {}, None
        if batch.token_adapters is not None:
            self.grouped = group_by_adapter(batch.token_adapters)
            return
        if batch.adapters is None:
            return
        lengths = torch.tensor(batch.query_lengths)
        owners = torch.tensor(batch.adapters).repeat_interleave(lengths)
        for slot in sorted(set(batch.adapters) - {-1}):
            self.of[slot] = torch.nonzero(owners == slot).flatten()


class LinearAdapters:
    """What adapters do at one layer."""

    def __init__(self, rows: AdapterRows, slotted: SlottedParts) -> None:
        self._rows = rows
        self._slotted = slotted

    @property
    def is_idle(self) -> bool:
        """Whether the step goes through none: it is computed as by a model without adapters."""
        return self._rows.is_empty

    def add(self, projected: Tensor, hidden: Tensor) -> Tensor:
        """Add what the step's adapters make of the layer's input, in place."""
        grouped = self._rows.grouped
        if grouped is not None:
            return add_low_ranks(projected, hidden, grouped, self._slotted)
        for slot, rows in self._rows.of.items():
            for part in self._slotted.parts.get(slot, ()):
                add_low_rank(projected, hidden, rows, part)
        return projected


class PlacedAdapter:
    """An adapter in a weight's precision, on its device: all of it in one piece of memory.

    Attributes:
        parts: views of it, as kernels read them: of ranks that are multiples of RANK_MULTIPLE, and
            aligned to as many elements.
    """

    def __init__(self, parts: AdapterParts, weight: Tensor) -> None:
        """Steps that are being computed need not end for it: it is brought there beside them, and
        waited for here."""
        widths = {
            path: [-(-len(part.down) // RANK_MULTIPLE) * RANK_MULTIPLE for part in own]
            for path, own in parts.items()
        }
        total = sum(
            width * (part.down.shape[1] + len(part.up))
            for path, own in parts.items()
            for part, width in zip(own, widths[path], strict=True)
        )
        packed = torch.zeros(total, dtype=weight.dtype)
        placed = torch.empty_like(packed, device=weight.device) if weight.is_cuda else packed
        self.parts: dict[str, tuple[LowRankPart, ...]] = {}
        end = 0
        for path, own in parts.items():
            found = []
            for part, width in zip(own, widths[path], strict=True):
                rank, inputs = part.down.shape
                begin, middle = end, end + width * inputs
                end = middle + width * len(part.up)
                packed[begin:middle].view(width, inputs)[:rank] = part.down
                packed[middle:end].view(-1, width)[:, :rank] = part.up
                down, up = placed[begin:middle].view(width, inputs), placed[middle:end]
                found.append(LowRankPart(down, up.view(-1, width), part.first))
            self.parts[path] = tuple(found)
        if weight.is_cuda:
            _send(packed, placed)
        self.num_bytes = placed.nbytes


def _send(packed: Tensor, placed: Tensor) -> None:
    """Bring memory of the host to a card beside what is computed there, through a piece that it can
    read by itself. What computed with this place before is waited for, on the card."""
    device = placed.device
    beside = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
    beside.wait_stream(torch.cuda.current_stream(device))
    staging = torch.empty(min(len(packed), _CHUNK), dtype=packed.dtype, pin_memory=True)
    with torch.cuda.stream(beside):
        pieces = zip(torch.split(placed, _CHUNK), torch.split(packed, _CHUNK), strict=True)
        for there, here in pieces:
            there.copy_(staging[: len(here)].copy_(here), non_blocking=True)
            beside.synchronize()


class ModelAdapters:
    """Those of a model, of which each step names some."""

    def __init__(
        self,
        num_parts: Mapping[str, int],
        *,
        max_adapters: int,
        max_rank: int,
        device: torch.device,
    ) -> None:
        """num_parts: of each projection that adapters may change, by its path, how many parts are
        merged there."""
        self._rows = AdapterRows()
        self._table = AdapterTable(max_adapters, max_rank, [*num_parts.values()], device)
        self.at = {
            path: LinearAdapters(self._rows, slotted)
            for path, slotted in zip(num_parts, self._table.at, strict=True)
        }

    def begin(self, batch: ForwardBatch) -> None:
        """Take in a step."""
        self._rows.begin(batch)

    def set(self, slot: int, adapter: PlacedAdapter | None) -> None:
        """Keep an adapter under a number by which batches name it; None: forget it."""
        parts = {} if adapter is None else adapter.parts
        self._table.set(slot, [parts.get(path, ()) for path in self.at])
