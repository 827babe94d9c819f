"""The input of steps that a device computes while the host is ahead of it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TypeAlias

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from services.engine.core.batch import CapturedShape, ForwardBatch
from services.engine.core.device_staging import DeviceStaging
from services.engine.core.kernels import DeviceLengths
from services.engine.core.preparation import LatestTokens, Preparation
from services.engine.core.sequence_rows import SequenceRows, TableChange
from services.engine.core.step_numbers import StepNumbers, padded

# Of each sequence, its tokens in the step and in the cache.
_Lengths: TypeAlias = tuple[tuple[int, ...], tuple[int, ...]]


class DeviceInputs:
    """Makes a step's ForwardBatch on a device; nothing in it waits for the device.

    The block tables of all running sequences live there and are told what is new in them. All
    other numbers of a step go there in one transfer, and what is new with them where the step is a
    graph that takes it in itself.

    Padding of a captured shape are sequences of one token, and of none, in the cache's last block,
    which belongs to nobody.
    """

    def __init__(
        self,
        rows: SequenceRows,
        latest: Tensor,
        *,
        device: torch.device,
        block_size: int,
        padding_block: int,
        max_batch_tokens: int,
        max_running_sequences: int,
        max_captured_tokens: int,
        max_context_tokens: int,
    ) -> None:
        """latest: [max_rows] int64, where the tokens of each step are chosen.
        padding_block: the one that belongs to nobody. max_captured_tokens: of a captured shape,
        of `max_batch_tokens` at most."""
        self._state = rows
        self._latest = latest
        self._block_size = block_size
        self._padding_block = padding_block
        self._padding_slots = padding_block * block_size + np.arange(block_size)
        self._max_context_tokens = max_context_tokens
        groups, max_blocks = rows.num_groups, -(-max_context_tokens // block_size)
        self._max_blocks = max_blocks
        # The last row is that of sequences that pad a step.
        self._padding_row = max_running_sequences
        self._num_rows = max_running_sequences + 1
        self._tables = torch.full(
            (groups, self._num_rows, max_blocks), padding_block, dtype=torch.int32, device=device
        )
        most = max_batch_tokens
        numbers = [(most + 1, 8), *[(most, 8)] * 2, (groups * most, 8)]
        numbers += [(most + 1, 4), *[(most, 4)] * 3]
        news = [*[(most, 8)] * 2, (groups * most, 8), (groups * most, 4)]
        self._numbers = DeviceStaging(DeviceStaging.bytes_for(*numbers, *news), device)
        self._news = DeviceStaging(
            DeviceStaging.bytes_for(
                *[(max_running_sequences, 8)] * 2,
                (groups * self._num_rows * max_blocks, 8),
                (groups * self._num_rows * max_blocks, 4),
            ),
            device,
        )
        # Where the tables of a step are, whatever its sequences.
        most_sequences = max(max_running_sequences, max_captured_tokens)
        self._step_tables = torch.zeros(
            groups * most_sequences * max_blocks, dtype=torch.int32, device=device
        )

    def batch(
        self,
        step: Preparation,
        token_ids: npt.NDArray[np.int64],
        latest: LatestTokens | None,
        captured: CapturedShape | None,
        adapters: tuple[int, ...] | None,
    ) -> ForwardBatch:
        """A step's input.

        token_ids: of all tokens, those of `latest` being anything. captured: what it is padded to;
        None: to nothing. adapters: the slot of each sequence's, -1 for none; None: nobody has one.
        """
        numbers = StepNumbers.of(step, token_ids, adapters)
        changes, width = self._state.take_changes(), step.block_tables.shape[-1]
        if captured is not None and captured.max_query_length is not None:
            return self._bounded(numbers, captured, width, latest, changes)
        if captured is not None:
            numbers.pad_tokens(captured.num_tokens, self._padding_slots)
        lengths = (step.plan.token_counts, step.context_lengths)
        batch = self._batch(numbers, lengths, width, latest, changes)
        return replace(batch, captured=captured)

    def batch_within(
        self,
        step: Preparation,
        token_ids: npt.NDArray[np.int64],
        latest: LatestTokens | None,
        captured: CapturedShape,
        adapters: tuple[int, ...] | None,
    ) -> ForwardBatch:
        """The same for a graph that takes in what is new, as `padding_within` has it captured, and
        is replayed next. Until then the latest tokens are missing, and the block tables those of
        another step."""
        numbers = StepNumbers.of(step, token_ids, adapters)
        return self._within(numbers, captured, latest, self._state.take_changes())[0]

    def padding_within(self, shape: CapturedShape) -> tuple[ForwardBatch, Callable[[], None]]:
        """A step of nothing but padding, and what takes in what is new: to be captured first."""
        return self._within(self._nothing(shape), shape, None, [])

    def padding(self, shape: CapturedShape) -> ForwardBatch:
        """A step of a captured shape in which there is nothing but padding."""
        numbers = self._nothing(shape)
        if shape.max_query_length is not None:
            return self._bounded(numbers, shape, 1, None, [])
        numbers.pad_tokens(shape.num_tokens, self._padding_slots)
        batch = self._batch(numbers, ((), ()), self._max_blocks, None, [])
        return replace(batch, captured=shape)

    def _nothing(self, shape: CapturedShape) -> StepNumbers:
        nothing = np.empty(0, np.int64)
        return StepNumbers(
            token_ids=nothing,
            positions=nothing,
            logits_rows=nothing,
            slots=np.empty((self._state.num_groups, 0), np.int64),
            query_starts=np.zeros(1, np.int32),
            contexts=np.empty(0, np.int32),
            owners=np.empty(0, np.int32),
            adapters=np.empty(0, np.int32) if shape.has_adapters else None,
        )

    def _bounded(
        self,
        numbers: StepNumbers,
        shape: CapturedShape,
        width: int,
        latest: LatestTokens | None,
        changes: list[TableChange],
    ) -> ForwardBatch:
        """A step of whose sequences the host does not tell how long they are. width: the columns of
        block tables that they use."""
        bounds = self._pad(numbers, shape)
        batch = self._batch(numbers, bounds, self._max_blocks, latest, changes)
        return replace(batch, captured=shape, are_bounds=True, num_table_columns=width)

    def _pad(self, numbers: StepNumbers, shape: CapturedShape) -> _Lengths:
        assert shape.max_query_length is not None
        size, count = shape.num_tokens, len(numbers.token_ids)
        numbers.pad_tokens(size, self._padding_slots)
        numbers.pad_sequences(size, count, self._padding_row)
        return (shape.max_query_length,) * size, (self._max_context_tokens,) * size

    def _within(
        self,
        numbers: StepNumbers,
        shape: CapturedShape,
        latest: LatestTokens | None,
        changes: list[TableChange],
    ) -> tuple[ForwardBatch, Callable[[], None]]:
        bounds = self._pad(numbers, shape)
        size = shape.num_tokens
        places, sources = _places(latest)
        cells, blocks = self._cells(changes)
        if len(cells) > (room := len(self._tables) * size):
            # Of long prompts that have entered.
            self._tell_news(None, changes, self._latest)
            cells, blocks = self._cells([])
        # What pads these goes behind the tokens, and to the table of sequences that pad.
        numbers.token_ids = padded(numbers.token_ids, size + 1, 0)
        news = [
            padded(places, size, size),
            padded(sources, size, 0),
            padded(cells, room, self._padding_row * self._max_blocks),
            padded(blocks, room, self._padding_block),
        ]
        ids, *others = self._numbers.send([*numbers.arrays(), *news])
        numbers_there, there = [ids[:size], *others[: -len(news)]], others[-len(news) :]
        owners, width = numbers_there[-1], self._max_blocks

        def take_in() -> None:
            ids.index_copy_(0, there[0], self._latest.index_select(0, there[1]))
            self._tables.view(-1).index_copy_(0, there[2], there[3])
            self._tables_of(owners, width)

        batch = self._made(numbers_there, bounds, self._place_of_tables(size, width))
        return replace(batch, captured=shape, are_bounds=True), take_in

    def _batch(
        self,
        numbers: StepNumbers,
        lengths: _Lengths,
        width: int,
        latest: LatestTokens | None,
        changes: list[TableChange],
    ) -> ForwardBatch:
        sent = self._numbers.send(numbers.arrays())
        self._tell_news(latest, changes, sent[0])
        return self._made(sent, lengths, self._tables_of(sent[-1], width))

    def _made(self, sent: list[Tensor], lengths: _Lengths, tables: Tensor) -> ForwardBatch:
        ids, positions, slots, *adapters, logits_rows, starts, contexts, _ = sent
        several = self._state.num_groups > 1
        return ForwardBatch(
            token_ids=ids,
            positions=positions,
            slots=slots if several else slots[0],
            block_tables=tables if several else tables[0],
            query_lengths=lengths[0],
            context_lengths=lengths[1],
            logits_rows=logits_rows,
            lengths=DeviceLengths(starts, contexts),
            token_adapters=adapters[0] if adapters else None,
        )

    def _tables_of(self, owners: Tensor, width: int) -> Tensor:
        """[groups, sequences, width]"""
        tables = self._place_of_tables(len(owners), width)
        return torch.index_select(self._tables[..., :width], 1, owners, out=tables)

    def _place_of_tables(self, num_sequences: int, width: int) -> Tensor:
        shape = (len(self._tables), num_sequences, width)
        return self._step_tables[: shape[0] * num_sequences * width].view(shape)

    def _tell_news(
        self, latest: LatestTokens | None, changes: list[TableChange], token_ids: Tensor
    ) -> None:
        places, sources = _places(latest)
        if not len(places) and not changes:
            return
        cells, blocks = self._cells(changes)
        there = self._news.send([places, sources, cells, blocks])
        if latest is not None and len(places):
            token_ids.index_copy_(0, there[0], latest.token_ids.index_select(0, there[1]))
        if changes:
            self._tables.view(-1).index_copy_(0, there[2], there[3])

    def _cells(
        self, changes: Sequence[TableChange]
    ) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int32]]:
        """Where changed entries of the tables are, and what they become."""
        if not changes:
            return np.empty(0, np.int64), np.empty(0, np.int32)
        groups = np.arange(len(self._tables)).reshape(-1, 1) * self._num_rows
        cells = [
            ((groups + each.row) * self._max_blocks + np.arange(each.begin, each.end)).ravel()
            for each in changes
        ]
        tables = self._state.block_tables.reshape(len(self._tables), -1, self._max_blocks)
        blocks = [tables[:, each.row, each.begin : each.end].ravel() for each in changes]
        changed = np.concatenate(blocks)
        # What a window hides is in no block. Who has the row next may have fewer blocks, and behind
        # those any will do, but it has to be one.
        changed[changed < 0] = self._padding_block
        return np.concatenate(cells), changed


def _places(latest: LatestTokens | None) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Where in a step's input the latest tokens go, and where they are."""
    places, sources = np.array([] if latest is None else latest.rows, np.int64).reshape(-1, 2).T
    return places, sources
