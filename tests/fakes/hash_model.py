"""A model whose next-token logits are a hash of all that it sees, read back through the KV cache.

Any wrong slot, position, block table or context length changes the hash, hence the output. A few
token ids are poison: what they do to a step is what real faults do.

The model has a group of layers for each of its windows. What a token sees is what all of them see:
the whole prefix where a window is None.
"""

from __future__ import annotations

import time
import zlib
from collections.abc import Callable, Sequence
from functools import partial

import numpy as np
import torch
from torch import Tensor

from services.engine.core.batch import ForwardBatch
from services.engine.core.model_config import SparseAttention, Window

VOCAB_SIZE = 64
EOS_TOKEN_ID = 2
# Poison. The last token of all is none: it is what comes of drawing from logits that are NaN.
RAISING_TOKEN_ID = 59  # a step with it in a context raises
NAN_TOKEN_ID = 60  # its sequence gets NaN logits
SLOW_TOKEN_ID = 61  # its steps take 20 ms
STALLING_TOKEN_ID = 62  # its step never ends

Windows = tuple[Window | None, ...]
NO_WINDOW: Windows = (None,)


def positions_seen(num_tokens: int, window: Window | None, queries: int = 1) -> list[int]:
    """The positions that the last tokens of so many see together."""
    if window is None:
        return list(range(num_tokens))
    is_sparse = isinstance(window, SparseAttention)
    near, first = (window.window, window.global_tokens) if is_sparse else (window, 0)
    begin = max(0, num_tokens - queries + 1 - near)
    return [*range(min(first, begin)), *range(begin, num_tokens)]


def seen_of(prefix: Sequence[int], windows: Windows) -> list[int]:
    """What the last token of a prefix sees, one window after the other."""
    return [
        prefix[position] for window in windows for position in positions_seen(len(prefix), window)
    ]


def logits_after(prefix: Sequence[int], windows: Windows = NO_WINDOW) -> Tensor:
    """Logits [vocab] after a prefix, computed without any cache."""
    return _logits(seen_of(prefix, windows))


def _logits(seen: Sequence[int]) -> Tensor:
    if NAN_TOKEN_ID in seen:
        return torch.full((VOCAB_SIZE,), torch.nan)
    digest = zlib.crc32(np.asarray(seen, np.int64).tobytes())
    logits = np.random.default_rng(digest).standard_normal(VOCAB_SIZE, np.float32) * 3
    logits[RAISING_TOKEN_ID:] = -np.inf  # poison is given, never generated
    return torch.from_numpy(logits)


class HashCache:
    """One token id and one position per slot."""

    def __init__(self, num_blocks: int, block_size: int) -> None:
        self.num_blocks = num_blocks
        self.block_size = block_size
        # One block more belongs to nobody: padding is written there.
        num_slots = (num_blocks + 1) * block_size
        self.token_ids = torch.full((num_slots,), -1, dtype=torch.int64)
        self.positions = torch.full((num_slots,), -1, dtype=torch.int64)

    def copy_blocks(self, pairs: Sequence[tuple[int, int]]) -> None:
        """Copy whole blocks, given as (source, destination)."""
        sources, destinations = torch.tensor(pairs).unbind(1)
        for slots in (self.token_ids, self.positions):
            blocks = slots.view(-1, self.block_size)
            blocks[destinations] = blocks[sources]


class HashStore:
    """Copies of so many blocks of a HashCache, at most."""

    def __init__(self, cache: HashCache, num_blocks: int) -> None:
        self._parts = [
            part.view(-1, cache.block_size) for part in (cache.token_ids, cache.positions)
        ]
        self._free = num_blocks
        self._saved: dict[int, list[Tensor]] = {}
        self.restored_blocks = 0
        self._tickets = 0

    @property
    def is_empty(self) -> bool:
        """Whether every ticket has been dropped."""
        return not self._saved

    def save(self, blocks: list[int]) -> int | None:
        """As BlockStore."""
        if len(blocks) > self._free:
            return None
        self._free -= len(blocks)
        self._tickets += 1
        self._saved[self._tickets] = [part[blocks].clone() for part in self._parts]
        return self._tickets

    def restore(self, ticket: int, blocks: list[int], *, first: int) -> None:
        """As BlockStore."""
        for part, saved in zip(self._parts, self._saved[ticket], strict=True):
            part[blocks] = saved[first:]
        self.restored_blocks += len(blocks)

    def drop(self, ticket: int) -> None:
        """As BlockStore."""
        self._free += len(self._saved.pop(ticket)[0])

    def join(self) -> None:
        """Copies are done at once."""


def make_hash_model(windows: Windows) -> Callable[[ForwardBatch, HashCache], Tensor]:
    """The model with these windows."""
    return partial(_compute, windows)


def _compute(windows: Windows, batch: ForwardBatch, cache: HashCache) -> Tensor:
    """Logits [num_rows, vocab] of the wanted rows; writes and reads the cache as a model does."""
    several = batch.slots.dim() > 1
    assert several == (len(windows) > 1)
    slots_of = batch.slots if several else batch.slots.unsqueeze(0)
    tables_of = batch.block_tables if several else batch.block_tables.unsqueeze(0)
    lengths = zip(batch.query_lengths, batch.context_lengths, strict=True)
    if batch.are_bounds:
        assert batch.lengths is not None
        starts, contexts = batch.lengths.query_starts, batch.lengths.contexts
        lengths = zip(starts.diff().tolist(), contexts.tolist(), strict=True)
    padding = cache.num_blocks * cache.block_size
    written = [slot for slot in slots_of.flatten().tolist() if slot < padding]
    assert len(set(written)) == len(written), "each token of a group has its own slot"
    for group, slots in enumerate(slots_of):
        cache.token_ids[slots] = batch.token_ids + group * VOCAB_SIZE
        cache.positions[slots] = batch.positions
    wanted = set(batch.logits_rows.tolist())
    rows: dict[int, Tensor] = {}
    end = 0
    for index, (queries, context) in enumerate(lengths):
        prefixes: list[dict[int, int]] = []  # of each group, tokens by position
        for group, (window, tables) in enumerate(zip(windows, tables_of, strict=True)):
            positions = torch.tensor(positions_seen(context, window, queries), dtype=torch.int64)
            blocks = tables[index].long()[positions // cache.block_size]
            slots = blocks * cache.block_size + positions % cache.block_size
            padded = queries > 0 and int(slots[-1]) >= padding
            assert padded or cache.positions[slots].tolist() == positions.tolist()
            # Other groups have other keys and values of the same tokens.
            prefix = (cache.token_ids[slots] - group * VOCAB_SIZE).tolist()
            prefixes.append(dict(zip(positions.tolist(), prefix, strict=True)))
            if RAISING_TOKEN_ID in prefix:
                raise RuntimeError("a poisoned sequence")
            if SLOW_TOKEN_ID in prefix:
                time.sleep(0.02)
            if STALLING_TOKEN_ID in prefix:
                time.sleep(3600)
        for row in range(end, end + queries):
            if row in wanted:
                last = int(batch.positions[row])
                rows[row] = _logits(
                    [
                        prefix[position]
                        for window, prefix in zip(windows, prefixes, strict=True)
                        for position in positions_seen(last + 1, window)
                    ]
                )
        end += queries
    if not wanted:
        return torch.empty((0, VOCAB_SIZE))
    return torch.stack([rows[row] for row in batch.logits_rows.tolist()])


hash_model = make_hash_model(NO_WINDOW)
