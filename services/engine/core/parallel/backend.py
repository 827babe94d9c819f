"""A model that is loaded on several ranks, as rank 0 builds its engine on it."""

from __future__ import annotations

import atexit
import logging
from itertools import pairwise
from typing import Any

import torch
from torch.distributed import TCPStore  # type: ignore[attr-defined]

from services.engine.core.errors import StartupError
from services.engine.core.kernels import Selection
from services.engine.core.kernels.choice import go_by, tune
from services.engine.core.layer_groups import LayerGroups
from services.engine.core.models.loader import OpenedModel
from services.engine.core.parallel.environment import LOOPBACK
from services.engine.core.parallel.model import ParallelKVCache, ParallelModel
from services.engine.core.parallel.rank import Rank, layout_of
from services.engine.core.parallel.ranks import abandon, join, leave
from services.engine.core.parallel.tuning import agreed, from_wire, to_wire
from services.engine.core.parallel.wire import Allocate, CountRows, GoBy, Load, Profile, Setup, Tune
from services.engine.core.parallel.workers import Workers
from services.engine.core.settings import CoreSettings

logger = logging.getLogger(__name__)

# torch.distributed knows one group of ranks per process.
_active: Workers | None = None


def start_workers(settings: CoreSettings) -> Workers | None:
    """Start the other ranks that the settings ask for, if any; they end with this process.

    Raises what Workers raises.
    """
    global _active
    layout = layout_of(settings)
    if layout.num_ranks == 1:
        return None
    _active = Workers(layout)
    return _active


@atexit.register
def end_workers() -> None:
    """End the other ranks, if there are any."""
    global _active
    if _active is not None:
        _active.close()
        _active = None
        abandon()
        leave()


class ParallelBackend:
    """See `backends.Backend`."""

    def __init__(
        self,
        opened: OpenedModel,
        settings: CoreSettings,
        device: torch.device,
        selections: list[Selection],
        workers: Workers,
    ) -> None:
        """Loads the model on all ranks.

        Raises:
            StartupError: it cannot be divided so, a rank is not to be had, or memory is short.
            ModelFileError: a tensor cannot be read.
        """
        layout = layout_of(settings)
        place = layout.place(0)
        self._rank = rank = Rank(opened, settings, place, device, workers.meeting.local_ranks)
        self._workers = workers
        workers.wait()
        is_local = workers.meeting.local_ranks == layout.num_ranks
        host = LOOPBACK if is_local else "0.0.0.0"
        store = TCPStore(host, 0, is_master=True, wait_for_workers=False)
        workers.tell(Setup(settings, store.port))
        free_bytes = [rank.free_bytes, *(each.value for each in workers.answers())]
        config = rank.config
        enough = settings.max_running_sequences * -(
            -config.max_context_tokens // settings.block_size
        )
        bounds = rank.divide(free_bytes, enough)
        if device.type == "cuda":
            torch.cuda.set_device(device)
        own_sums = "cuda" not in settings.excluded_kernels
        self._ranks = join(place, store, device, own_sums=own_sums)
        workers.tell(Load(bounds))
        self._shard = rank.load(bounds, self._ranks)
        workers.answers()
        self.dtype = str(rank.dtype).removeprefix("torch.")
        self.kernels = {each.op: each.implementation for each in selections}
        stages = [f"{last - first}" for first, last in pairwise(bounds)]
        self.kernels["ranks"] = f"{layout.tensor} x {layout.stages}"
        logger.info(
            "steps run on torch, on %d ranks: %d share each layer; layers of the stages: %s; rank "
            "0 has weights of %.0f MiB",
            layout.num_ranks,
            layout.tensor,
            ", ".join(stages),
            rank.weight_bytes / 2**20,
        )

    @property
    def settings(self) -> CoreSettings:
        """The settings by which rank 0 sizes its KV cache."""
        return self._rank.settings()

    def bytes_per_block(self, block_size: int, groups: LayerGroups) -> int:
        """Bytes of one block of the KV cache, of those that rank 0 has."""
        return self._rank.bytes_per_block

    def profile(self) -> None:
        """Have the other ranks watch what memory the steps that follow take."""
        self._workers.tell(Profile())
        self._workers.answers()

    def count_rows(self, graphs_bytes: int) -> int:
        """The rows of blocks, for all layers, for which the other ranks have room, beside CUDA
        graphs of so many bytes on each."""
        self._workers.tell(CountRows(graphs_bytes))
        return min(each.value for each in self._workers.answers())

    def tune(self) -> None:
        """Have all ranks go by what all of them measure of their products."""
        self._workers.tell(Tune())
        own = tune(self._shard.matrices(), self._rank.dtype)
        others = [from_wire(each.timings) for each in self._workers.answers()]
        choices = agreed([own, *others])
        go_by(choices)
        self._workers.tell(GoBy(to_wire(choices)))

    def allocate(
        self, num_blocks: int, settings: CoreSettings, groups: LayerGroups
    ) -> tuple[Any, Any]:
        """Return the model, as the runner calls it, and its KV cache."""
        self._workers.tell(Allocate(num_blocks))
        own = self._rank.allocate(num_blocks)
        self._workers.answers()
        model = ParallelModel(self._shard, self._ranks, self._workers)
        return model, ParallelKVCache(own, self._workers)


def refuse_ranks(settings: CoreSettings, what: str) -> None:
    """Raise StartupError where the settings divide what is not to be divided."""
    if layout_of(settings).num_ranks > 1:
        raise StartupError(
            f"{what} is not divided over ranks: leave tensor_parallel and pipeline_parallel at 1"
        )
