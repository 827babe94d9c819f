"""A rank other than rank 0: does what rank 0 tells it until that is gone.

On rank 0's machine it ends then. On others it starts over and waits for the next rank 0, which an
engine that failed makes within seconds, unless it was asked to end meanwhile.
"""

from __future__ import annotations

import argparse
import logging
import os
import select
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import FrameType

import torch
from torch.distributed import TCPStore  # type: ignore[attr-defined]

from services.engine.core.batch import ForwardBatch
from services.engine.core.errors import StartupError
from services.engine.core.graphs import CudaRecorder, Recorder
from services.engine.core.kernels import select as select_kernels
from services.engine.core.kernels.choice import go_by, tune
from services.engine.core.kernels.device_check import check_device
from services.engine.core.kv_cache import KVCache
from services.engine.core.models.loader import open_model
from services.engine.core.parallel.environment import Meeting, rank_of_worker
from services.engine.core.parallel.rank import Rank, choose_kernels, device_of, layout_of
from services.engine.core.parallel.ranks import TorchRanks, join
from services.engine.core.parallel.shard import Shard
from services.engine.core.parallel.step_input import NOT_CAPTURED, StepHeader, StepMemory, unpack
from services.engine.core.parallel.tuning import from_wire, to_wire
from services.engine.core.parallel.wire import (
    Allocate,
    AnsweredOrder,
    Beat,
    BeginCapture,
    Connection,
    CopyBlocks,
    CountRows,
    Done,
    Failed,
    Forget,
    GoBy,
    Hello,
    Load,
    Profile,
    SetAdapter,
    Setup,
    Tune,
    adapter_from_wire,
)
from services.engine.core.parallel.workers import BEAT_S
from services.engine.core.startup import count_rows, resolve_device

logger = logging.getLogger(__name__)

_RETRY_S = 1.0

# What captures the steps of a rank.
make_recorder: Callable[[torch.device], Recorder] = CudaRecorder


class Worker:
    """Follows rank 0 at the other end of a connection."""

    def __init__(self, rank: int, meeting: Meeting, connection: Connection) -> None:
        self._index = rank
        self._meeting = meeting
        self._connection = connection
        self._rank: Rank
        self._ranks: TorchRanks
        self._shard: Shard
        self._kv_cache: KVCache | None = None
        self._memory: StepMemory

    def follow(self) -> None:
        """Carry out orders.

        Raises:
            ConnectionError: rank 0 is gone.
        """
        with torch.inference_mode():
            while True:
                order = self._connection.receive_order()
                if isinstance(order, StepHeader):
                    self._step(order)
                elif isinstance(order, CopyBlocks):
                    self._cache.copy_blocks(order.pairs)
                elif isinstance(order, GoBy):
                    go_by(from_wire(order.timings))
                elif isinstance(order, Forget):
                    self._shard.graphs.forget(order.shape)
                elif isinstance(order, SetAdapter):
                    parts = order.parts
                    self._shard.set_adapter(
                        order.slot,
                        None
                        if parts is None
                        else self._shard.place_adapter(adapter_from_wire(parts)),
                    )
                else:
                    self._answer(order)

    @property
    def _cache(self) -> KVCache:
        assert self._kv_cache is not None, "it is allocated before there are steps"
        return self._kv_cache

    def _step(self, header: StepHeader) -> None:
        ranks = self._ranks
        ranks.num_exchanges = 0
        try:
            batch = self._receive(header)
            if header.is_to_be_captured:
                self._shard.graphs.capture(batch, self._cache)
                self._connection.send(Done(self._shard.graphs.num_bytes()))
            else:
                self._shard(batch, self._cache)
        except ConnectionError:
            raise
        except Exception as error:
            logger.exception("step %d failed on rank %d", header.number, self._index)
            problem = f"{type(error).__name__}: {error}"
            self._connection.send(Failed(problem, header.number, ranks.num_exchanges))

    def _receive(self, header: StepHeader) -> ForwardBatch:
        if header.captured != NOT_CAPTURED:
            packed = self._memory.packed(header)
            self._ranks.broadcast(packed)
            return self._memory.batch(header, packed)
        packed = torch.empty(header.num_packed, dtype=torch.int32, device=self._rank.device)
        self._ranks.broadcast(packed)
        return unpack(header, packed)

    def _answer(self, order: AnsweredOrder) -> None:
        try:
            if isinstance(order, Setup):
                self._connection.send(Done(self._open(order)))
                own_sums = "cuda" not in order.settings.excluded_kernels
                self._ranks = join(
                    self._rank.place, self._store, self._rank.device, own_sums=own_sums
                )
            else:
                self._connection.send(self._do(order))
        except ConnectionError:
            raise
        except Exception as error:
            own = (
                str(error)
                if isinstance(error, StartupError)
                else f"{type(error).__name__}: {error}"
            )
            self._connection.send(Failed(own))

    def _open(self, order: Setup) -> int:
        settings, local_ranks = order.settings, self._meeting.local_ranks
        # Machines are alike: ranks have the devices behind that of rank 0.
        device = device_of(resolve_device(settings.device), self._index % local_ranks)
        choose_kernels(settings, device)
        # Rank 0 has looked already: on its machine this is known.
        refused = check_device(device).refused if device.type == "cuda" else {}
        select_kernels(device.type, settings.excluded_kernels, refused)
        opened = open_model(
            Path(settings.model_path),
            max_context_tokens=settings.max_context_tokens,
            allow_pickled=settings.allow_pickled,
            sparse_attention=settings.sparse_attention,
        )
        place = layout_of(settings).place(self._index)
        self._rank = Rank(opened, settings, place, device, local_ranks)
        self._store = TCPStore(self._meeting.address, order.store_port, is_master=False)
        return self._rank.free_bytes

    def _do(self, order: Load | Profile | CountRows | Allocate | Tune | BeginCapture) -> Done:
        rank = self._rank
        if isinstance(order, Load):
            self._shard = rank.load(order.bounds, self._ranks)
        elif isinstance(order, Profile):
            rank.profile()
        elif isinstance(order, CountRows):
            return Done(self._count_rows(order.graphs_bytes))
        elif isinstance(order, Allocate):
            self._kv_cache = rank.allocate(order.num_blocks)
        elif isinstance(order, Tune):
            return Done(timings=to_wire(tune(self._shard.matrices(), rank.dtype)))
        else:
            self._shard.begin_capture(make_recorder(rank.device), order.shapes, rank.device)
            self._memory = rank.step_memory(order.shapes)
        return Done()

    def _count_rows(self, graphs_bytes: int) -> int:
        rank, self._kv_cache = self._rank, None
        row = len(rank.groups.windows) * rank.bytes_per_block
        return count_rows(rank.settings(graphs_bytes), rank.config, row, rank.device)


def _beat(connection: Connection) -> None:
    """Say that the process runs."""
    while True:
        time.sleep(BEAT_S)
        try:
            connection.send(Beat())
        except OSError:
            return  # rank 0 is gone


class _Ending:
    """How this process ends: at once, without waiting for what was under way with ranks that may
    be gone."""

    def __init__(self, meeting: Meeting) -> None:
        self._starts_over = not meeting.was_started_by_leader

    def ask(self, number: int, frame: FrameType | None) -> None:
        """Have it end with rank 0. A signal reaches whole process groups and pods, but rank 0
        decides when it is over: after it has drained."""
        self._starts_over = False

    def now(self) -> None:
        """End it, or start over."""
        if self._starts_over:
            os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])
        os._exit(0)

    def with_leader(self, connection: socket.socket) -> None:
        """End it when rank 0 is gone, whatever it is at."""
        poll = select.poll()
        poll.register(connection, select.POLLRDHUP)
        poll.poll()
        self.now()


def _connect(meeting: Meeting) -> socket.socket:
    """A connection to rank 0, which may not be there yet, unless it has started this process."""
    while True:
        try:
            return socket.create_connection((meeting.address, meeting.port))
        except OSError as error:
            if meeting.was_started_by_leader:
                raise StartupError(
                    f"rank 0 is not at {meeting.address}:{meeting.port}: {error}"
                ) from None
            time.sleep(_RETRY_S)


def _environment() -> dict[str, str]:
    """The environment, with what the command line says in place of it: under torchrun on one of
    several machines, ranks count from 0 and the address is that machine's own."""
    parser = argparse.ArgumentParser(prog="python -m services.engine.core.parallel.worker")
    parser.add_argument("--leader", metavar="HOST:PORT", help="where rank 0 listens")
    parser.add_argument("--first-rank", type=int, default=0, help="what RANK counts from")
    options = parser.parse_args()
    variables = dict(os.environ)
    if options.leader is not None:
        variables["MASTER_ADDR"], _, variables["MASTER_PORT"] = options.leader.rpartition(":")
    variables["RANK"] = str(rank_of_worker() + options.first_rank)
    return variables


def main() -> int:
    """The entry point of a rank, which the environment tells of itself and of rank 0."""
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(message)s")
    try:
        environment = _environment()
        rank, meeting = rank_of_worker(environment), Meeting.of_worker(environment)
        raw = _connect(meeting)
    except StartupError as error:
        print(error, file=sys.stderr)
        return 1
    ending = _Ending(meeting)
    signal.signal(signal.SIGINT, ending.ask)
    signal.signal(signal.SIGTERM, ending.ask)
    connection = Connection(raw)
    threading.Thread(target=ending.with_leader, args=(raw,), daemon=True).start()
    try:
        connection.send(Hello(rank, meeting.token))
        threading.Thread(target=_beat, args=(connection,), daemon=True).start()
        Worker(rank, meeting, connection).follow()
    except ConnectionError:
        ending.now()
    return 0


if __name__ == "__main__":
    sys.exit(main())
