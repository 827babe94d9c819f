"""What ranks exchange while they compute a step, over torch.distributed: NCCL between GPUs, gloo
between CPUs. Short sums between GPUs of one machine are our own (`short_sums`)."""

from __future__ import annotations

import contextlib
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import TCPStore  # type: ignore[attr-defined]

from services.engine.core.parallel import short_sums
from services.engine.core.parallel.layout import Place
from services.engine.core.parallel.short_sums import ShortSums

# As of the ranks, there are those of one stage in a process.
_short_sums: ShortSums | None = None


class Ranks(Protocol):
    """The other ranks, as one of them sees them.

    All take part in what is exchanged, in the same order. `num_exchanges` counts what a rank has
    begun: ranks that have failed after as many are where they can go on together.
    """

    place: Place
    num_exchanges: int

    def broadcast(self, values: Tensor) -> None:
        """Make `values` on all ranks what they are on rank 0."""

    def sum(self, partial: Tensor) -> Tensor:
        """Add up the parts of a sum that the ranks of a stage have, in place; returns it."""

    def pass_on(self, hidden: Tensor) -> None:
        """Send hidden states to the stage behind."""

    def take_over(self, hidden: Tensor) -> None:
        """Receive them from the stage before, in place."""

    def collect(self, share: Tensor, shares: Tensor | None) -> None:
        """Bring what each rank of the last stage has to rank 0.

        share: of this rank, unused where it is not of the last stage. shares: [ranks of a stage,
        *share's shape] on rank 0.
        """


class TorchRanks:
    """Those of the process group that `torch.distributed` has been given."""

    def __init__(self, place: Place) -> None:
        self.place = place
        self.num_exchanges = 0
        self._short: ShortSums | None = None
        layout = place.layout
        # Every rank has to name all groups, in the same order.
        groups = [dist.new_group(layout.ranks_of(stage)) for stage in range(layout.stages)]
        self._stage = groups[place.stage]

    def connect(self, device: torch.device) -> ShortSums | None:
        """Have short sums computed by our own kernels, where the ranks of the stage find together
        that they can be, and that it pays."""
        self._short = short_sums.connect(
            self.place.tensor_rank, device, self._gather, self._sum_otherwise
        )
        return self._short

    def _gather(self, own: Any) -> list[Any]:
        gathered = [None] * self.place.layout.tensor
        dist.all_gather_object(gathered, own, group=self._stage)
        return gathered

    def broadcast(self, values: Tensor) -> None:
        self.num_exchanges += 1
        dist.broadcast(values, src=0)

    def sum(self, partial: Tensor) -> Tensor:
        self.num_exchanges += 1
        if self._short is None or not self._short.sum(partial):
            self._sum_otherwise(partial)
        return partial

    def _sum_otherwise(self, partial: Tensor) -> None:
        dist.all_reduce(partial, group=self._stage)

    def pass_on(self, hidden: Tensor) -> None:
        self._exchange([dist.P2POp(dist.isend, hidden, self.place.behind)])

    def take_over(self, hidden: Tensor) -> None:
        self._exchange([dist.P2POp(dist.irecv, hidden, self.place.before)])

    def collect(self, share: Tensor, shares: Tensor | None) -> None:
        place = self.place
        if shares is None:
            if place.is_last:
                self._exchange([dist.P2POp(dist.isend, share, 0)])
            return
        operations = []
        for index, rank in enumerate(place.layout.ranks_of(place.layout.stages - 1)):
            if rank == 0:
                shares[index].copy_(share)
            else:
                operations.append(dist.P2POp(dist.irecv, shares[index], rank))
        self._exchange(operations)

    def _exchange(self, operations: list[dist.P2POp]) -> None:
        self.num_exchanges += 1
        if operations:
            for work in dist.batch_isend_irecv(operations):
                work.wait()


def join(
    place: Place, store: TCPStore, device: torch.device, *, own_sums: bool = True
) -> TorchRanks:
    """Join the ranks of a model, which all do so at about the same time.

    own_sums: whether short sums may be computed by our own kernels.
    """
    on_gpu = device.type == "cuda"
    dist.init_process_group(
        "nccl" if on_gpu else "gloo",
        store=store,
        rank=place.rank,
        world_size=place.layout.num_ranks,
        device_id=device if on_gpu else None,
    )
    ranks = TorchRanks(place)
    if own_sums and on_gpu and place.layout.tensor > 1:
        global _short_sums
        _short_sums = ranks.connect(device)
    return ranks


def leave() -> None:
    """Leave them, if there are any, without waiting for them."""
    global _short_sums
    if _short_sums is not None:
        _short_sums.close()
        _short_sums = None
    if dist.is_initialized():
        dist.destroy_process_group()


def abandon() -> None:
    """End what GPUs exchange, from any thread: whoever waits for it goes on, with what is of no
    use. Between CPUs it ends with the connection to the rank that is gone."""
    if _short_sums is not None:
        _short_sums.abandon()
    if dist.is_initialized() and dist.get_backend() == "nccl":
        with contextlib.suppress(Exception):  # of a library that may be at fault itself
            dist.distributed_c10d._abort_process_group()
