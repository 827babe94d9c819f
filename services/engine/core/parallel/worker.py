"""A rank other than rank 0: does what rank 0 tells it until that is gone."""

from __future__ import annotations

import logging
import os
import select
import signal
import socket
import sys
import threading
import time
from pathlib import Path

import torch
from torch.distributed import TCPStore  # type: ignore[attr-defined]

from services.engine.core.errors import StartupError
from services.engine.core.kernels import select as select_kernels
from services.engine.core.kv_cache import KVCache
from services.engine.core.models.loader import open_model
from services.engine.core.parallel.environment import Meeting, rank_of_worker
from services.engine.core.parallel.rank import Rank, choose_kernels, device_of, layout_of
from services.engine.core.parallel.ranks import TorchRanks, join
from services.engine.core.parallel.shard import Shard
from services.engine.core.parallel.wire import (
    Allocate,
    Beat,
    Connection,
    CopyBlocks,
    Done,
    Failed,
    Hello,
    Load,
    SetAdapter,
    Setup,
    StepHeader,
    adapter_from_wire,
    unpack,
)
from services.engine.core.parallel.workers import BEAT_S
from services.engine.core.startup import count_rows, resolve_device

logger = logging.getLogger(__name__)

_RETRY_S = 1.0


class Worker:
    """Follows rank 0 at the other end of a connection."""

    def __init__(self, rank: int, meeting: Meeting, connection: Connection) -> None:
        self._index = rank
        self._meeting = meeting
        self._connection = connection
        self._rank: Rank
        self._ranks: TorchRanks
        self._shard: Shard
        self._kv_cache: KVCache

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
                    self._kv_cache.copy_blocks(order.pairs)
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

    def _step(self, header: StepHeader) -> None:
        ranks = self._ranks
        ranks.num_exchanges = 0
        try:
            packed = torch.empty(header.num_packed, dtype=torch.int64, device=self._rank.device)
            ranks.broadcast(packed)
            self._shard(unpack(header, packed), self._kv_cache)
        except Exception as error:
            logger.exception("step %d failed on rank %d", header.number, self._index)
            problem = f"{type(error).__name__}: {error}"
            self._connection.send(Failed(problem, header.number, ranks.num_exchanges))

    def _answer(self, order: Setup | Load | Allocate) -> None:
        try:
            if isinstance(order, Setup):
                self._connection.send(Done(self._open(order)))
                self._ranks = join(self._rank.place, self._store, self._rank.device)
            elif isinstance(order, Load):
                self._connection.send(Done(self._load(order)))
            else:
                self._kv_cache = self._rank.allocate(order.num_blocks)
                self._connection.send(Done())
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
        select_kernels(device.type)
        opened = open_model(
            Path(settings.model_path),
            max_context_tokens=settings.max_context_tokens,
            allow_pickled=settings.allow_pickled,
        )
        place = layout_of(settings).place(self._index)
        self._rank = Rank(opened, settings, place, device, local_ranks)
        self._store = TCPStore(self._meeting.address, order.store_port, is_master=False)
        return self._rank.free_bytes

    def _load(self, order: Load) -> int:
        rank = self._rank
        self._shard = rank.load(order.bounds, self._ranks)
        row = len(rank.groups.windows) * rank.bytes_per_block
        return count_rows(rank.settings, rank.config, row, rank.device)


def _beat(connection: Connection) -> None:
    """Say that the process runs."""
    while True:
        time.sleep(BEAT_S)
        try:
            connection.send(Beat())
        except OSError:
            os._exit(1)


def _end_with_leader(connection: socket.socket) -> None:
    """End the process when rank 0 is gone, whatever it is at."""
    poll = select.poll()
    poll.register(connection, select.POLLRDHUP)
    poll.poll()
    os._exit(1)


def _connect(meeting: Meeting, *, waits: bool) -> socket.socket:
    """A connection to rank 0. waits: for one that does not listen yet, for ever."""
    while True:
        try:
            return socket.create_connection((meeting.address, meeting.port))
        except OSError as error:
            if not waits:
                raise StartupError(
                    f"rank 0 is not at {meeting.address}:{meeting.port}: {error}"
                ) from None
            time.sleep(_RETRY_S)


def main() -> int:
    """The entry point of a rank, which torchrun's variables tell of rank 0."""
    # Both reach whole process groups and pods, but rank 0 decides when it is over: after it has
    # drained.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(message)s")
    try:
        rank, meeting = rank_of_worker(), Meeting.of_worker()
        raw = _connect(meeting, waits=rank >= meeting.local_ranks)
    except StartupError as error:
        print(error, file=sys.stderr)
        return 1
    connection = Connection(raw)
    try:
        connection.send(Hello(rank, meeting.token))
        threading.Thread(target=_beat, args=(connection,), daemon=True).start()
        threading.Thread(target=_end_with_leader, args=(raw,), daemon=True).start()
        Worker(rank, meeting, connection).follow()
    except ConnectionError:
        pass
    # Without waiting for what was under way with ranks that may be gone.
    os._exit(0)


if __name__ == "__main__":
    sys.exit(main())
