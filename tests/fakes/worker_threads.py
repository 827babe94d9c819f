"""Engines of several ranks in one process: workers are threads instead of processes."""

from __future__ import annotations

import contextlib
import socket
import subprocess
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

from services.engine.core.parallel import backend, worker, workers
from services.engine.core.parallel.environment import Meeting, rank_of_worker
from services.engine.core.parallel.layout import Layout, Place
from services.engine.core.parallel.wire import Connection, Hello
from tests.fakes.ranks_in_threads import Exchange, ThreadRanks


class WorkerThread:
    """What `subprocess.Popen` is of a worker: a thread that follows rank 0."""

    returncode = 0

    def __init__(self, env: Mapping[str, str]) -> None:
        self._is_killed = False
        meeting, rank = Meeting.of_worker(env), rank_of_worker(env)
        self._socket = socket.create_connection((meeting.address, meeting.port))
        connection = Connection(self._socket)
        connection.send(Hello(rank, meeting.token))
        self._thread = threading.Thread(
            target=self._follow, args=(worker.Worker(rank, meeting, connection),), daemon=True
        )
        self._thread.start()
        threading.Thread(target=worker._beat, args=(connection,), daemon=True).start()

    def _follow(self, follower: worker.Worker) -> None:
        with contextlib.suppress(OSError):  # rank 0 is gone
            follower.follow()

    def poll(self) -> int | None:
        """None while it runs."""
        return None if self._thread.is_alive() else 0

    def kill(self) -> None:
        """Part it from rank 0; who waits for another rank may do so for a while."""
        self._is_killed = True
        self._socket.close()

    def wait(self, timeout: float = 30.0) -> None:
        """Wait until it has ended, or is to be forgotten."""
        if not self._is_killed:
            self._thread.join(timeout)
        if self._thread.is_alive() and not self._is_killed:
            raise subprocess.TimeoutExpired("a worker", timeout)


@contextmanager
def worker_threads(layout: Layout) -> Iterator[None]:
    """Have an engine that is built meanwhile start threads, which exchange in this process."""
    exchange = Exchange(layout)

    def start(command: Any, *, env: Mapping[str, str], **rest: Any) -> WorkerThread:
        return WorkerThread(env)

    def join(place: Place, store: Any, device: Any, **rest: Any) -> ThreadRanks:
        return ThreadRanks(place, exchange)

    with (
        patch.object(workers.subprocess, "Popen", start),
        patch.object(worker, "join", join),
        patch.object(backend, "join", join),
    ):
        try:
            yield
        finally:
            backend.end_workers()
