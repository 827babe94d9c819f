"""Sums over ranks, each a process with a card: by our own kernels and by NCCL.

There have to be two cards at least. Two processes on one card take turns of milliseconds, which
says nothing of a link between cards.
"""

from __future__ import annotations

import multiprocessing
import tempfile
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch

from benchmarks.gpu_bench import Bench, Row

_TIMEOUT_S = 60.0


def sums(bench: Bench) -> None:
    """What a sum over 2, 4, and 8 cards takes, by its size."""
    count = torch.cuda.device_count() if bench.device.type == "cuda" else 0
    if count < 2:
        note = f"there are {count} GPUs, and it takes two"
        bench.add(Row(bench.part, "sums over ranks", "-", None, "us", note=note))
        return
    for ranks in (each for each in (2, 4, 8) if each <= count):
        found = _measured(ranks)
        if isinstance(found, str):
            bench.add(Row(bench.part, f"{ranks} ranks", "-", None, "us", note=found))
            continue
        for method, by_size in found.items():
            name = "NCCL" if method == "otherwise" else method
            for size, seconds in by_size.items():
                case = f"{ranks} ranks, {size // 1024} KiB"
                bench.add(Row(bench.part, case, name, 1e6 * seconds, "us", seconds=seconds))


def _measured(ranks: int) -> Any:
    """Seconds by method and size, or why there are none."""
    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    with tempfile.TemporaryDirectory() as directory:
        path = str(Path(directory) / "meeting")
        processes = [
            context.Process(target=_measure, args=(rank, ranks, path, sender), daemon=True)
            for rank in range(ranks)
        ]
        for each in processes:
            each.start()
        sender.close()
        try:
            return receiver.recv() if receiver.poll(_TIMEOUT_S) else "ranks do not come back"
        except EOFError:
            return "ranks have failed: see log.txt"
        finally:
            for each in processes:
                each.kill()
                each.join()


def _measure(rank: int, ranks: int, path: str, sender: Connection) -> None:
    import torch.distributed as dist

    from services.engine.core.kernels import cuda
    from services.engine.core.parallel import short_sums

    device = torch.device("cuda", rank)
    torch.cuda.set_device(device)
    dist.init_process_group(
        "nccl", init_method=f"file://{path}", rank=rank, world_size=ranks, device_id=device
    )
    cuda.activate(device)

    def gather(own: Any) -> list[Any]:
        gathered = [None] * ranks
        dist.all_gather_object(gathered, own)
        return gathered

    found = short_sums.connect(rank, device, gather, dist.all_reduce)
    if rank == 0:
        sender.send("cards do not reach each other" if found is None else found.seconds)
    gather(None)
