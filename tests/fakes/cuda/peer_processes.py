"""Ranks as processes that share GPUs, or one GPU, and meet over gloo: NCCL refuses the latter.

`run` has each of them do something; what is done is a function of a module, which a process can
find by its name.
"""

from __future__ import annotations

import multiprocessing
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from services.engine.core.kernels import cuda
from services.engine.core.kernels.cuda.all_reduce import Inbox, OpenInbox, PeerSums, holds
from services.engine.core.parallel import short_sums

# On one card processes take turns of some milliseconds, each while another waits for it.
_TIMEOUT_S = 240.0
SIZES = (16, 48, 8192, 8208, 65536, 2**18, 2**20)


@dataclass(frozen=True, slots=True)
class Here:
    """Where a process stands: its rank and how many there are, and its card."""

    rank: int
    ranks: int
    device: torch.device

    def gather(self, own: Any) -> list[Any]:
        """What all processes tell each other."""
        gathered = [None] * self.ranks
        dist.all_gather_object(gathered, own)
        return gathered

    def sum_by_host(self, values: Tensor) -> None:
        """A sum in place, by way of the hosts."""
        parts = self.gather(values.float().cpu())
        total = parts[0]
        for part in parts[1:]:
            total = total + part
        values.copy_(total)

    def peers(self, patience_s: float, *, traps: bool) -> PeerSums:
        """The sums of all of them."""
        inbox = Inbox(self.device)
        handles = self.gather(inbox.handle)
        addresses = [
            inbox.address if rank == self.rank else OpenInbox(self.device, handle).address
            for rank, handle in enumerate(handles)
        ]
        return PeerSums(self.rank, addresses, self.device, patience_s=patience_s, traps=traps)


def run(
    what: Callable[[Here], Any], devices: Sequence[int], directory: Path, killed: int = -1
) -> list[Any]:
    """What each process returns, or "" for the one that is `killed` once all are at it."""
    context = multiprocessing.get_context("spawn")
    path = str(directory / "meeting")
    processes: list[BaseProcess] = []
    # One each: a process that is killed takes the lock of a queue with it.
    told: dict[Any, int] = {}
    found: dict[int, Any] = {killed: ""} if killed >= 0 else {}
    try:
        for rank in range(len(devices)):
            receiver, sender = context.Pipe(duplex=False)
            told[receiver] = rank
            arguments = (what, rank, tuple(devices), path, sender)
            processes.append(context.Process(target=_run, args=arguments))
            processes[-1].start()
            sender.close()
        end = time.monotonic() + _TIMEOUT_S
        while len(found) < len(processes):
            assert time.monotonic() < end, f"only ranks {sorted(found)} have come back"
            for receiver in wait(list(told), timeout=1.0):
                rank = told[receiver]
                try:
                    result = receiver.recv()
                except EOFError:
                    del told[receiver]
                    assert rank in found, f"rank {rank} has ended"
                    continue
                if result is _at_it:
                    processes[rank].kill()
                elif rank != killed:
                    found[rank] = result
        return [found[rank] for rank in range(len(processes))]
    finally:
        for each in processes:
            each.kill()
            each.join()


def _at_it() -> None:
    """Stands for a process that says that it can be killed now."""


def _run(what: Any, rank: int, devices: tuple[int, ...], path: str, results: Connection) -> None:
    device = torch.device("cuda", devices[rank])
    torch.cuda.set_device(device)
    dist.init_process_group(
        "gloo", init_method=f"file://{path}", rank=rank, world_size=len(devices)
    )
    cuda.activate(device)
    global _say
    _say = results.send
    results.send(what(Here(rank, len(devices), device)))


_say: Callable[[Any], None]


def sums_are_right(here: Here) -> str:
    """Sums of all sizes, one behind another and in graphs that are launched again and again."""
    peers = here.peers(30.0, traps=False)
    problems = []
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        for two_shot in (False, True):
            sizes = [size for size in SIZES if holds(size, here.ranks, two_shot=two_shot)]
            generator = torch.Generator().manual_seed(here.rank)
            parts = [
                torch.randn(size // dtype.itemsize, generator=generator).to(dtype) for size in sizes
            ]
            right = [_total(gathered) for gathered in map(here.gather, parts)]
            values = [part.to(here.device) for part in parts]
            for each in values:
                peers.sum(each, two_shot=two_shot)
            problems += _wrong("launched", values, right)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, capture_error_mode="thread_local"):
                for each in values:
                    peers.sum(each, two_shot=two_shot)
            for _ in range(3):
                for each, part in zip(values, parts, strict=True):
                    each.copy_(part)
                graph.replay()
                problems += _wrong("in a graph", values, right)
    if peers.has_timed_out:
        problems.append("a sum never came")
    here.gather(None)
    return "; ".join(problems)


def _total(parts: Sequence[Tensor]) -> Tensor:
    total = parts[0].float()
    for part in parts[1:]:
        total = total + part.float()
    return total.to(parts[0].dtype)


def _wrong(how: str, values: Sequence[Tensor], right: Sequence[Tensor]) -> list[str]:
    return [
        f"{how}, {each.nbytes} bytes of {each.dtype}"
        for each, expected in zip(values, right, strict=True)
        if not torch.equal(each.cpu(), expected)
    ]


def choice(here: Here) -> str:
    """What ranks choose that join as those of an engine do."""
    sums = short_sums.connect(here.rank, here.device, here.gather, here.sum_by_host)
    if sums is None:
        return "nothing"
    values = torch.full((4096,), float(here.rank + 1), dtype=torch.bfloat16, device=here.device)
    is_own = sums.sum(values)
    expected = here.ranks * (here.ranks + 1) // 2
    said = f"{sums.choice}: {is_own and bool((values == expected).all())}"
    here.gather(None)
    sums.close()
    return said


def waits_in_vain(here: Here) -> bool:
    """Whether rank 0 finds that another never comes."""
    peers = here.peers(1.0, traps=False)
    if here.rank == 0:
        peers.sum(torch.zeros(64, device=here.device), two_shot=False)
        torch.cuda.synchronize()
    here.gather(None)
    return peers.has_timed_out


def is_trapped(here: Here) -> str:
    """What rank 0 is told that waits in vain for too long."""
    peers = here.peers(1.0, traps=True)
    said = ""
    if here.rank == 0:
        peers.sum(torch.zeros(64, device=here.device), two_shot=False)
        try:
            torch.cuda.synchronize()
        except RuntimeError as error:
            said = str(error)
    here.gather(None)
    return said


def outlives_another(here: Here) -> float:
    """Seconds that rank 0 still waits, once sums are given up, for one that was killed while it
    waited in its kernel. The last rank is the one that is killed."""
    peers = here.peers(600.0, traps=True)
    values = torch.zeros(4096, device=here.device)
    for _ in range(10):
        peers.sum(values, two_shot=False)
    torch.cuda.synchronize()
    here.gather(None)
    if here.rank == here.ranks - 1:
        # It waits for rank 0, which never comes, and is killed in there.
        peers.sum(values, two_shot=True)
        time.sleep(0.5)
        _say(_at_it)
        time.sleep(_TIMEOUT_S)
    if here.rank > 0:
        return 0.0
    time.sleep(3.0)
    peers.sum(values, two_shot=True)
    peers.sum(values, two_shot=True)
    threading.Timer(1.0, peers.abandon).start()
    started = time.monotonic()
    torch.cuda.synchronize()
    return time.monotonic() - started
