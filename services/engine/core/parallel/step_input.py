"""A step's input as rank 0 sends it: what hosts have to know, and what devices read."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise

import msgspec
import numpy as np
import torch
from torch import Tensor

from services.engine.core.batch import CapturedShape, ForwardBatch
from services.engine.core.kernels import DeviceLengths

_NUM_FIXED = 12  # integers of a header that every header has
# Integers of 32 bits, from one part of what devices read to the next: kernels load 16 bytes.
_ALIGNMENT = 4
NOT_CAPTURED = -1


class StepHeader(msgspec.Struct, frozen=True, array_like=True):
    """What is known on the host of a step: all but the integers that are on the device.

    Attributes:
        table_shape: of what is sent of the block tables: all that is in use.
        captured: the number of its shape, among those that may be captured; NOT_CAPTURED: it is
            computed kernel by kernel.
        is_to_be_captured: whether the step is captured, rather than computed.
    """

    number: int
    num_tokens: int
    num_rows: int
    table_shape: tuple[int, ...]
    has_lengths: bool
    has_token_adapters: bool
    are_bounds: bool
    captured: int
    is_to_be_captured: bool
    query_lengths: tuple[int, ...]
    context_lengths: tuple[int, ...]
    adapters: tuple[int, ...] | None

    @classmethod
    def of(
        cls,
        number: int,
        batch: ForwardBatch,
        *,
        captured: int = NOT_CAPTURED,
        is_to_be_captured: bool = False,
    ) -> StepHeader:
        """That of a batch."""
        return cls(
            number,
            len(batch.token_ids),
            len(batch.logits_rows),
            tuple(_tables_in_use(batch).shape),
            batch.lengths is not None,
            batch.token_adapters is not None,
            batch.are_bounds,
            captured,
            is_to_be_captured,
            batch.query_lengths,
            batch.context_lengths,
            batch.adapters,
        )

    @property
    def num_packed(self) -> int:
        """How many integers `pack` makes of the batch."""
        return sum(_aligned(size) for size in map(_num_words, self.parts()))

    def parts(self) -> list[tuple[torch.dtype, tuple[int, ...]]]:
        """What devices read, in the order in which it is sent: what graphs read of it begins at the
        same places in all steps of the same shape."""
        several = len(self.table_shape) > 2
        tokens, sequences = (self.num_tokens,), len(self.query_lengths)
        parts: list[tuple[torch.dtype, tuple[int, ...]]] = [
            (torch.int64, tokens),
            (torch.int64, tokens),
            (torch.int64, (self.table_shape[0], *tokens) if several else tokens),
        ]
        if self.has_token_adapters:
            parts.append((torch.int32, tokens))
        parts.append((torch.int64, (self.num_rows,)))
        if self.has_lengths:
            parts += [(torch.int32, (sequences + 1,)), (torch.int32, (sequences,))]
        return [*parts, (torch.int32, self.table_shape)]

    def to_bytes(self) -> bytes:
        """As integers, in a fixed order: lengths of what has one first."""
        count = len(self.query_lengths)
        # Bounds, of captured steps, are the same for all sequences.
        same = count > 0 and all(
            lengths.count(lengths[0]) == count
            for lengths in (self.query_lengths, self.context_lengths)
        )
        told = 1 if same else count
        fixed = (
            self.number,
            self.num_tokens,
            self.num_rows,
            count,
            told,
            len(self.table_shape),
            self.captured,
            self.has_lengths,
            self.has_token_adapters,
            self.are_bounds,
            self.is_to_be_captured,
            self.adapters is not None,
        )
        lengths = self.query_lengths[:told] + self.context_lengths[:told]
        values = (*fixed, *self.table_shape, *lengths, *(self.adapters or ()))
        return np.array(values, np.int64).tobytes()

    @classmethod
    def from_bytes(cls, payload: bytes) -> StepHeader:
        """What `to_bytes` made."""
        values = np.frombuffer(payload, np.int64).tolist()
        number, num_tokens, num_rows, count, told, dims, captured, *flags = values[:_NUM_FIXED]
        has_lengths, has_token_adapters, are_bounds, is_to_be_captured, adapted = map(bool, flags)
        ends = np.cumsum([_NUM_FIXED, dims, told, told, count * adapted]).tolist()
        shape, queries, contexts, adapters = (
            tuple(values[start:end]) for start, end in pairwise(ends)
        )
        if told < count:
            queries, contexts = queries * count, contexts * count
        return cls(
            number,
            num_tokens,
            num_rows,
            shape,
            has_lengths,
            has_token_adapters,
            are_bounds,
            captured,
            is_to_be_captured,
            queries,
            contexts,
            adapters if adapted else None,
        )


def pack(batch: ForwardBatch) -> Tensor:
    """All integers of a batch that are on the device, in one tensor, [StepHeader.num_packed]
    int32."""
    parts = [batch.token_ids, batch.positions, batch.slots]
    if batch.token_adapters is not None:
        parts.append(batch.token_adapters)
    parts.append(batch.logits_rows)
    if batch.lengths is not None:
        parts += [batch.lengths.query_starts, batch.lengths.contexts]
    words = [part.reshape(-1).view(torch.int32) for part in (*parts, _tables_in_use(batch))]
    gaps = words[0].new_zeros(_ALIGNMENT)
    aligned = []
    for each in words:
        aligned += [each, gaps[: _aligned(len(each)) - len(each)]]
    return torch.cat(aligned)


def unpack(header: StepHeader, packed: Tensor) -> ForwardBatch:
    """The batch that was packed, where it lies."""
    found, end = [], 0
    for dtype, shape in header.parts():
        begin, end = end, end + _num_words((dtype, shape))
        found.append(packed[begin:end].view(dtype).view(shape))
        end = _aligned(end)
    token_ids, positions, slots, *adapters = found[: 3 + header.has_token_adapters]
    rows, *lengths, tables = found[3 + header.has_token_adapters :]
    return ForwardBatch(
        token_ids=token_ids,
        positions=positions,
        slots=slots,
        block_tables=tables,
        query_lengths=header.query_lengths,
        context_lengths=header.context_lengths,
        logits_rows=rows,
        lengths=DeviceLengths(*lengths) if lengths else None,
        are_bounds=header.are_bounds,
        adapters=header.adapters,
        token_adapters=adapters[0] if adapters else None,
    )


class StepMemory:
    """Where the input of captured steps arrives on a rank: that of steps of the same shape in the
    same places, so that graphs find it there."""

    def __init__(
        self,
        shapes: Sequence[CapturedShape],
        *,
        max_running_sequences: int,
        max_blocks: int,
        num_groups: int,
        device: torch.device,
    ) -> None:
        """shapes: those that may be captured. max_blocks: of a sequence."""
        wholes = [each.num_tokens for each in shapes if each.max_query_length is not None]
        tokens = max(each.num_tokens for each in shapes)
        sequences = max(max_running_sequences, *wholes, 0)
        lengths = (0,) * sequences
        largest = StepHeader(
            number=0,
            num_tokens=tokens,
            num_rows=tokens,
            table_shape=(num_groups, sequences, max_blocks),
            has_lengths=True,
            has_token_adapters=True,
            are_bounds=False,
            captured=NOT_CAPTURED,
            is_to_be_captured=False,
            query_lengths=lengths,
            context_lengths=lengths,
            adapters=None,
        )
        self._shapes = shapes
        self._max_blocks = max_blocks
        self._packed = torch.zeros(largest.num_packed, dtype=torch.int32, device=device)
        # Graphs read tables of all blocks that a sequence may have; what arrives are those in use.
        cells = num_groups * max(wholes, default=0) * max_blocks
        self._tables = torch.zeros(cells, dtype=torch.int32, device=device)

    def packed(self, header: StepHeader) -> Tensor:
        """Where a captured step arrives."""
        return self._packed[: header.num_packed]

    def batch(self, header: StepHeader, packed: Tensor) -> ForwardBatch:
        """The batch that arrived there, as graphs read it."""
        batch = replace(unpack(header, packed), captured=self._shapes[header.captured])
        if not header.are_bounds:
            return batch  # of which attention is computed as it is
        shape = (*header.table_shape[:-1], self._max_blocks)
        tables = self._tables[: math.prod(shape)].view(shape)
        # What lies behind is of no sequence: lengths say so.
        tables[..., : header.table_shape[-1]].copy_(batch.block_tables)
        return replace(batch, block_tables=tables)


def _tables_in_use(batch: ForwardBatch) -> Tensor:
    return batch.block_tables[..., : batch.num_table_columns]


def _num_words(part: tuple[torch.dtype, tuple[int, ...]]) -> int:
    dtype, shape = part
    return math.prod(shape) * dtype.itemsize // 4


def _aligned(num_words: int) -> int:
    return -(-num_words // _ALIGNMENT) * _ALIGNMENT
