"""A model of several ranks, as the runner of rank 0 calls it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from services.engine.core.batch import CapturedShape, ForwardBatch
from services.engine.core.graphs import Recorder
from services.engine.core.kernels import AdapterParts
from services.engine.core.kv_cache import KVCache
from services.engine.core.layers.adapters import PlacedAdapter
from services.engine.core.parallel.ranks import Ranks
from services.engine.core.parallel.shard import Shard
from services.engine.core.parallel.step_input import NOT_CAPTURED, StepHeader, pack
from services.engine.core.parallel.wire import (
    AdapterMatrix,
    BeginCapture,
    CopyBlocks,
    Forget,
    SetAdapter,
    adapter_to_wire,
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
    so nobody waits for a device. What follows is the same sequence of kernels on every rank of a
    stage, which they capture together.
    """

    def __init__(self, shard: Shard, ranks: Ranks, workers: Workers) -> None:
        """shard: of rank 0."""
        self._shard, self._ranks, self._workers = shard, ranks, workers
        self._number = 0
        self._shapes: dict[CapturedShape, int] = {}  # those that may be captured, by their numbers
        self._graphs_bytes = 0

    @torch.inference_mode()
    def __call__(self, batch: ForwardBatch, kv_cache: ParallelKVCache) -> Tensor:
        """Compute a step; returns its logits.

        Raises:
            FatalEngineError: a rank is gone, or they are no longer at the same point.
        """
        self._tell(batch)
        try:
            self._ranks.broadcast(pack(batch))
            logits = self._shard(batch, kv_cache.own)
        except Exception as error:
            self._workers.judge(error, self._number, self._ranks.num_exchanges)
            raise
        return logits

    def _tell(self, batch: ForwardBatch, *, is_to_be_captured: bool = False) -> None:
        self._number += 1
        captured = NOT_CAPTURED if batch.captured is None else self._shapes[batch.captured]
        header = StepHeader.of(
            self._number, batch, captured=captured, is_to_be_captured=is_to_be_captured
        )
        self._workers.tell_step(header.to_bytes())
        self._ranks.num_exchanges = 0

    def graphed(
        self, recorder: Recorder, shapes: Sequence[CapturedShape], *, device: torch.device
    ) -> ParallelModel:
        """Have all ranks compute steps by graphs where they have been captured; returns the model.

        recorder: of rank 0. shapes: those that may be captured.
        """
        self._shapes = {shape: number for number, shape in enumerate(shapes)}
        self._workers.tell(BeginCapture(list(shapes)))
        self._shard.begin_capture(recorder, shapes, device)
        self._workers.answers()
        return self

    @torch.inference_mode()
    def capture(self, batch: ForwardBatch, kv_cache: ParallelKVCache) -> None:
        """Capture a step on all ranks at the same time, or on none.

        Raises:
            RuntimeError: it cannot be captured on one of them.
            FatalEngineError: ranks are no longer at the same point.
        """
        assert batch.captured is not None
        self._tell(batch, is_to_be_captured=True)
        failure: Exception | None = None
        try:
            self._ranks.broadcast(pack(batch))
            self._shard.graphs.capture(batch, kv_cache.own)
        except Exception as error:
            failure = error
        captured = self._workers.agree(self._number, failure, self._ranks.num_exchanges)
        self._graphs_bytes = max(self._shard.graphs.num_bytes(), *captured.num_bytes, 0)
        if captured.problem:
            self._shard.graphs.forget(batch.captured)
            self._workers.tell(Forget(batch.captured))
            raise RuntimeError(captured.problem) from failure

    def num_bytes(self) -> int:
        """Memory that graphs hold, of the rank where they hold the most."""
        return self._graphs_bytes

    def prepare_adapter(self, parts: AdapterParts) -> _PreparedAdapter:
        """Return an adapter as `set_adapter` takes it. May be done beside steps."""
        return _PreparedAdapter(self._shard.place_adapter(parts), adapter_to_wire(parts))

    def set_adapter(self, slot: int, adapter: _PreparedAdapter | None) -> None:
        """Keep an adapter on all ranks under a number by which batches name it; None: forget it."""
        self._workers.tell(SetAdapter(slot, None if adapter is None else adapter.matrices))
        self._shard.set_adapter(slot, None if adapter is None else adapter.own)
