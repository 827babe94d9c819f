"""A model whose next-token logits are a hash of the whole prefix, read back through the KV cache.

Any wrong slot, position, block table or context length changes the hash, hence the output. A few
token ids are poison: what they do to a step is what real faults do.
"""

from __future__ import annotations

import time
import zlib
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from services.engine.core.batch import ForwardBatch

VOCAB_SIZE = 64
EOS_TOKEN_ID = 2
RAISING_TOKEN_ID = 60  # a step with it in a context raises
NAN_TOKEN_ID = 61  # its sequence gets NaN logits
SLOW_TOKEN_ID = 62  # its steps take 20 ms
STALLING_TOKEN_ID = 63  # its step never ends


def logits_after(prefix: Sequence[int]) -> Tensor:
    """Logits [vocab] after a prefix, computed without any cache."""
    if NAN_TOKEN_ID in prefix:
        return torch.full((VOCAB_SIZE,), torch.nan)
    digest = zlib.crc32(np.asarray(prefix, np.int64).tobytes())
    logits = np.random.default_rng(digest).standard_normal(VOCAB_SIZE, np.float32) * 3
    logits[NAN_TOKEN_ID - 1 :] = -np.inf  # poison is given, never generated
    return torch.from_numpy(logits)


class HashCache:
    """One token id and one position per slot."""

    def __init__(self, num_blocks: int, block_size: int) -> None:
        self.block_size = block_size
        self.token_ids = torch.full((num_blocks * block_size,), -1, dtype=torch.int64)
        self.positions = torch.full((num_blocks * block_size,), -1, dtype=torch.int64)

    def copy_blocks(self, pairs: Sequence[tuple[int, int]]) -> None:
        """Copy whole blocks, given as (source, destination)."""
        sources, destinations = torch.tensor(pairs).unbind(1)
        for slots in (self.token_ids, self.positions):
            blocks = slots.view(-1, self.block_size)
            blocks[destinations] = blocks[sources]


def hash_model(batch: ForwardBatch, cache: HashCache) -> Tensor:
    """Logits [num_rows, vocab] of the wanted rows; writes and reads the cache as a model does."""
    cache.token_ids[batch.slots] = batch.token_ids
    cache.positions[batch.slots] = batch.positions
    wanted = set(batch.logits_rows.tolist())
    rows: dict[int, Tensor] = {}
    end = 0
    for index, (queries, context) in enumerate(
        zip(batch.query_lengths, batch.context_lengths, strict=True)
    ):
        offsets = torch.arange(cache.block_size)
        blocks = batch.block_tables[index].long()
        slots = (blocks.unsqueeze(-1) * cache.block_size + offsets).flatten()[:context]
        prefix = cache.token_ids[slots].tolist()
        assert cache.positions[slots].tolist() == list(range(context))
        if RAISING_TOKEN_ID in prefix:
            raise RuntimeError("a poisoned sequence")
        if SLOW_TOKEN_ID in prefix:
            time.sleep(0.02)
        if STALLING_TOKEN_ID in prefix:
            time.sleep(3600)
        for row in range(end, end + queries):
            if row in wanted:
                position = int(batch.positions[row])
                rows[row] = logits_after(prefix[: position + 1])
        end += queries
    if not wanted:
        return torch.empty((0, VOCAB_SIZE))
    return torch.stack([rows[row] for row in batch.logits_rows.tolist()])
