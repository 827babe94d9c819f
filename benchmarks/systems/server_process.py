"""A server of somebody else's, as a child process: started, asked, ended with all it started."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractAsyncContextManager, suppress
from types import TracebackType
from typing import Self

from benchmarks.load import BenchmarkError, Client, Run, run_workload
from benchmarks.workloads import Request, Workload

START_TIMEOUT_S = 300.0
STOP_TIMEOUT_S = 20.0
POLL_S = 0.05
LOG_TAIL_BYTES = 3000

ClientFactory = Callable[[], AbstractAsyncContextManager[Client]]


class NotServingError(Exception):
    """The server cannot be reached, or says that it is still loading."""


class ServerProcess:
    """Runs while the `with` block does.

    Args:
        command: what to start.
        environment: laid over this process's own.
        make_client: an asynchronous context manager that yields a client; made anew for each
            workload, so that no connection outlives its event loop.
    """

    def __init__(
        self,
        command: Sequence[str],
        environment: Mapping[str, str],
        make_client: ClientFactory,
    ) -> None:
        self._command = command
        self._environment = environment
        self._make_client = make_client

    def __enter__(self) -> Self:
        self._log = tempfile.TemporaryFile()
        self._process = subprocess.Popen(
            list(self._command),
            stdin=subprocess.DEVNULL,
            stdout=self._log,
            stderr=subprocess.STDOUT,
            env={**os.environ, **self._environment},
            process_group=0,
        )
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        tb: TracebackType | None,
    ) -> None:
        if self._process.poll() is None:
            self._process.send_signal(signal.SIGINT)
            with suppress(subprocess.TimeoutExpired):
                self._process.wait(timeout=STOP_TIMEOUT_S)
        # The process group the server leads holds whatever it has started and left behind.
        with suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        self._log.close()

    @property
    def pid(self) -> int:
        """The server's first process."""
        return self._process.pid

    def first_token(self, request: Request) -> None:
        """See RunningSystem."""
        asyncio.run(self._first_token(request))

    def run(self, workload: Workload) -> Run:
        """See RunningSystem."""

        async def run() -> Run:
            async with self._make_client() as client:
                return await run_workload(client, workload)

        try:
            return asyncio.run(run())
        except* (BenchmarkError, NotServingError) as errors:
            raise BenchmarkError(f"{errors.exceptions[0]}\n{self.log_tail()}") from errors

    def log_tail(self) -> str:
        """The last lines that the server wrote."""
        size = os.fstat(self._log.fileno()).st_size
        offset = max(0, size - LOG_TAIL_BYTES)
        return os.pread(self._log.fileno(), LOG_TAIL_BYTES, offset).decode(errors="replace")

    async def _first_token(self, request: Request) -> None:
        give_up_s = time.perf_counter() + START_TIMEOUT_S
        while True:
            try:
                async with self._make_client() as client:
                    await client.generate(request, lambda: None)
                return
            except NotServingError:
                if self._process.poll() is not None:
                    raise BenchmarkError(f"the server ended:\n{self.log_tail()}") from None
                if time.perf_counter() > give_up_s:
                    raise BenchmarkError(f"the server does not start:\n{self.log_tail()}") from None
                await asyncio.sleep(POLL_S)
