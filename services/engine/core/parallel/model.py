"""A model of several ranks, as the runner of rank 0 calls it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from services.engine.core.batch import ForwardBatch
from services.engine.core.kernels import AdapterParts
from services.engine.core.kv_cache import KVCache
from services.engine.core.layers.adapters import PlacedAdapter
from services.engine.core.parallel.ranks import Ranks
from services.engine.core.parallel.shard import Shard
from services.engine.core.parallel.wire import (
    AdapterMatrix,
    CopyBlocks,
    SetAdapter,
    StepHeader,
    adapter_to_wire,
    pack,
)
from services.engine.core.parallel.workers import Workers


class ParallelKVCache:
    """The KV cache of all ranks. Each has its own layers and heads of every block."""

    def __init__(self, own: KVCache, workers: Workers) -> None:
        """own: that of rank 0."""
        self.own = own
        self.num_blocks = own.num_blocks
        self._workers = workers

    def copy_blocks(self, pairs: Sequence[tuple[int, int]]) -> None:
        """Copy whole blocks, given as (source, destination), on every rank."""
        self._workers.tell(CopyBlocks(list(pairs)))
        self.own.copy_blocks(pairs)


@dataclass(frozen=True, slots=True)
class _PreparedAdapter:
    """An adapter as rank 0 has it, and as it is sent to the others."""

    own: PlacedAdapter
    matrices: list[AdapterMatrix]

    @property
    def num_bytes(self) -> int:
        """What it takes of rank 0's device."""
        return self.own.num_bytes


class ParallelModel:
    """Computes steps on all ranks: `model(batch, kv_cache)`, as Model does.

    A step's lengths go ahead to the hosts of the other ranks, its integers from device to device:
    so nobody waits for a device, and what follows, `compute`, is the same sequence of kernels on
    every rank, which each may capture for itself.
    """

    def __init__(
        self,
        shard: Shard,
        ranks: Ranks,
        workers: Workers,
        compute: Callable[[ForwardBatch, KVCache], Tensor] | None = None,
    ) -> None:
        """compute: what rank 0 computes its part of a step with; by default its shard."""
        self._shard, self._ranks, self._workers = shard, ranks, workers
        self._compute = compute or shard
        self._number = 0

    @torch.inference_mode()
    def __call__(self, batch: ForwardBatch, kv_cache: ParallelKVCache) -> Tensor:
        """Compute a step; returns its logits.

        Raises:
            FatalEngineError: a rank is gone, or they are no longer at the same point.
        """
        self._number += 1
        header = StepHeader.of(self._number, batch)
        self._workers.tell_step(header.to_bytes())
        self._ranks.num_exchanges = 0
        try:
            self._ranks.broadcast(pack(batch))
            logits = self._compute(batch, kv_cache.own)
        except Exception as error:
            self._workers.judge(error, self._number, self._ranks.num_exchanges)
            raise
        return logits

    def prepare_adapter(self, parts: AdapterParts) -> _PreparedAdapter:
        """Return an adapter as `set_adapter` takes it. May be done beside steps."""
        return _PreparedAdapter(self._shard.place_adapter(parts), adapter_to_wire(parts))

    def set_adapter(self, slot: int, adapter: _PreparedAdapter | None) -> None:
        """Keep an adapter on all ranks under a number by which batches name it; None: forget it."""
        self._workers.tell(SetAdapter(slot, None if adapter is None else adapter.matrices))
        self._shard.set_adapter(slot, None if adapter is None else adapter.own)
