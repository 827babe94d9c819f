"""The ranks of a model as threads of one process, which exchange tensors by handing them over."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from torch import Tensor

from services.engine.core.batch import ForwardBatch
from services.engine.core.kernels import AdapterParts
from services.engine.core.kv_cache import KVCache
from services.engine.core.layer_groups import LayerGroups
from services.engine.core.models.kept import KeptWeights
from services.engine.core.models.loader import OpenedModel
from services.engine.core.parallel.layout import Layout, Place
from services.engine.core.parallel.shard import Shard, load_shard, outline_shard
from services.engine.core.parallel.stages import stage_groups

_TIMEOUT_S = 20.0


class Exchange:
    """Where all ranks of a model meet."""

    def __init__(self, layout: Layout) -> None:
        self.parts: list[dict[int, Tensor]] = [{} for _ in range(layout.stages)]
        self.barriers = [threading.Barrier(layout.tensor) for _ in range(layout.stages)]
        self.sent: dict[int, queue.SimpleQueue[Tensor]] = {
            rank: queue.SimpleQueue() for rank in range(layout.num_ranks)
        }
        self.shares: dict[int, queue.SimpleQueue[Tensor]] = {
            rank: queue.SimpleQueue() for rank in range(layout.num_ranks)
        }
        self.told: dict[int, queue.SimpleQueue[Tensor]] = {
            rank: queue.SimpleQueue() for rank in range(1, layout.num_ranks)
        }


class ThreadRanks:
    """See `Ranks`."""

    def __init__(self, place: Place, exchange: Exchange) -> None:
        self.place = place
        self.num_exchanges = 0
        self._exchange = exchange

    def broadcast(self, values: Tensor) -> None:
        self.num_exchanges += 1
        if self.place.rank == 0:
            for each in self._exchange.told.values():
                each.put(values.clone())
        else:
            told = self._exchange.told[self.place.rank].get(timeout=_TIMEOUT_S)
            assert told.shape == values.shape
            values.copy_(told)

    def sum(self, partial: Tensor) -> Tensor:
        self.num_exchanges += 1
        place, parts = self.place, self._exchange.parts[self.place.stage]
        parts[place.tensor_rank] = partial.clone()
        self._wait()
        partial.copy_(sum(parts[index] for index in range(place.layout.tensor)))
        self._wait()
        return partial

    def _wait(self) -> None:
        self._exchange.barriers[self.place.stage].wait(_TIMEOUT_S)

    def pass_on(self, hidden: Tensor) -> None:
        self.num_exchanges += 1
        self._exchange.sent[self.place.behind].put(hidden.clone())

    def take_over(self, hidden: Tensor) -> None:
        hidden.copy_(self._exchange.sent[self.place.rank].get(timeout=_TIMEOUT_S))

    def collect(self, share: Tensor, shares: Tensor | None) -> None:
        place = self.place
        if place.is_last:
            self._exchange.shares[place.rank].put(share.clone())
        if shares is not None:
            last = place.layout.ranks_of(place.layout.stages - 1)
            for index, rank in enumerate(last):
                shares[index].copy_(self._exchange.shares[rank].get(timeout=_TIMEOUT_S))


class ShardedModel:
    """A model on ranks that are threads; called as a model is, with a cache that it ignores: each
    rank has its own."""

    def __init__(
        self,
        opened: OpenedModel,
        layout: Layout,
        bounds: list[int],
        num_blocks: int,
        size: int,
        weights: KeptWeights = "bfloat16",
    ) -> None:
        """bounds: the first layer of each stage, and their number. size: of a block."""
        config = opened.config
        exchange = Exchange(layout)
        self.config = config
        self.shards: list[Shard] = []
        self.caches: list[KVCache] = []
        groups = LayerGroups.single(config.num_layers)
        for rank in range(layout.num_ranks):
            place = layout.place(rank)
            stage = range(bounds[place.stage], bounds[place.stage + 1])
            outline = outline_shard(config, place, stage, torch.float32)
            model = load_shard(
                outline, config, place, opened.checkpoint, torch.float32, "cpu", weights
            )
            self.shards.append(Shard(model, config, ThreadRanks(place, exchange)))
            own = stage_groups(groups, stage)
            kv_heads = model.config.kv_heads
            self.caches.append(
                KVCache(
                    config.num_layers,
                    num_blocks,
                    size,
                    kv_heads,
                    config.head_dim,
                    torch.float32,
                    "cpu",
                    own,
                )
            )
        self._threads = ThreadPoolExecutor(layout.num_ranks)

    def parameters(self) -> Any:
        """Those of rank 0."""
        return self.shards[0].model.parameters()

    def __call__(self, batch: ForwardBatch, kv_cache: Any) -> Tensor:
        pairs = zip(self.shards, self.caches, strict=True)
        steps = [self._threads.submit(shard, batch, cache) for shard, cache in pairs]
        logits, *_ = [step.result() for step in steps]
        return logits

    def set_adapter(self, slot: int, parts: AdapterParts) -> None:
        """Keep an adapter on all ranks."""
        for shard in self.shards:
            shard.set_adapter(slot, shard.place_adapter(parts))

    def bytes_of(self, what: Callable[[Shard], Any]) -> list[int]:
        """Bytes of some tensors of each rank."""
        return [sum(each.nbytes for each in what(shard)) for shard in self.shards]
