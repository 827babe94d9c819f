"""A core of several ranks, of which some break when a prompt asks for it."""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Callable

from torch import Tensor

from services.engine.core import process
from services.engine.core.batch import ForwardBatch
from services.engine.core.kv_cache import KVCache
from services.engine.core.parallel import worker, workers
from services.engine.core.parallel.shard import Shard

COMMAND = (sys.executable, "-m", "tests.fakes.faulty_ranks")

_LENGTH = 6  # of a prompt that breaks something: one token, again and again
# All ranks fail before they exchange anything, rank 1 fails by itself, and a call on rank 1 never
# returns, with the interpreter's lock held.
ALL_FAIL, ONE_FAILS, ONE_HANGS = ([token] * _LENGTH for token in (91, 92, 93))


def _break(rank: int, batch: ForwardBatch) -> None:
    start, token_ids = 0, batch.token_ids.tolist()
    for length in batch.query_lengths:
        prompt = token_ids[start : start + length]
        start += length
        if prompt == ALL_FAIL or (prompt == ONE_FAILS and rank == 1):
            raise ValueError("a poisoned prompt")
        if prompt == ONE_HANGS and rank == 1:
            ctypes.PyDLL(None).pause()


def _breaking(
    compute: Callable[[Shard, ForwardBatch, KVCache], Tensor],
) -> Callable[[Shard, ForwardBatch, KVCache], Tensor]:
    def call(shard: Shard, batch: ForwardBatch, kv_cache: KVCache) -> Tensor:
        _break(shard._place.rank, batch)
        return compute(shard, batch, kv_cache)

    return call


if __name__ == "__main__":
    Shard.__call__ = _breaking(Shard.__call__)  # type: ignore[method-assign]
    workers.WORKER_COMMAND = COMMAND
    sys.exit(process.main() if len(sys.argv) > 1 else worker.main())
