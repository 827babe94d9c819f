"""The engine core alone, in a process of its own that is asked for one workload at a time."""

from __future__ import annotations

import multiprocessing
import os
import time
from multiprocessing.connection import Connection
from typing import Any

from benchmarks.load import BenchmarkError, Run, Trace, check, finished_run
from benchmarks.workloads import Request, Workload
from services.engine.core import startup
from services.engine.core.engine import EngineCore
from services.engine.core.messages import Sampling, SequenceRequest, Stopping
from services.engine.core.settings import CoreSettings
from services.engine.core_process import CORE_ENVIRONMENT


class CoreProcess:
    """Runs while the `with` block does; between runs it waits without using a processor."""

    def __init__(self, settings: dict[str, Any]) -> None:
        context = multiprocessing.get_context("spawn")
        self._connection, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(theirs, settings), daemon=True)
        self._description: str | None = None

    def __enter__(self) -> CoreProcess:
        # The engine starts its core in this environment; alone it must not fare worse.
        before = dict(os.environ)
        os.environ.update(CORE_ENVIRONMENT)
        self._process.start()
        os.environ.clear()
        os.environ.update(before)
        return self

    def __exit__(self, *_: object) -> None:
        if self._process.is_alive():
            self._connection.send(None)
        self._process.join(timeout=10)
        if self._process.is_alive():
            self._process.kill()

    @property
    def pid(self) -> int:
        """The process."""
        assert self._process.pid is not None
        return self._process.pid

    @property
    def description(self) -> str:
        """What it computes in, and with which kernels."""
        if self._description is None:
            self._description = str(self._receive())
        return self._description

    def first_token(self, request: Request) -> None:
        """See RunningSystem."""
        self.run(Workload("start", 1, (request,)))

    def run(self, workload: Workload) -> Run:
        """See RunningSystem: the same closed loop as over a network, from within the step loop."""
        assert self.description
        self._connection.send(workload)
        run: Run = self._receive()
        return run

    def _receive(self) -> Any:
        try:
            answer = self._connection.recv()
        except EOFError:
            raise BenchmarkError("the core ended") from None
        if isinstance(answer, BenchmarkError):
            raise answer
        return answer


def _serve(connection: Connection, settings: dict[str, Any]) -> None:
    engine, facts = startup.build_engine(CoreSettings(**settings))
    kernels = sorted(set(facts.kernels.values()))
    connection.send(f"{facts.dtype} on {facts.device}, kernels: {', '.join(kernels)}")
    while (workload := connection.recv()) is not None:
        try:
            connection.send(_run(engine, workload))
        except BenchmarkError as error:
            connection.send(error)


def _run(engine: EngineCore, workload: Workload) -> Run:
    pending = iter(enumerate(workload.requests))
    traces: dict[int, Trace] = {}

    def send_next() -> None:
        for index, request in pending:
            traces[index] = Trace(sent_s=time.perf_counter())
            engine.add([_sequence(index, request)])
            return

    for _ in range(workload.concurrency):
        send_next()
    while engine.has_work:
        deltas = engine.step().deltas
        now_s = time.perf_counter()
        for delta in deltas:
            trace = traces[delta.sequence_id]
            if delta.token_ids:
                trace.message_s.append(now_s)
                trace.output_tokens += len(delta.token_ids)
            if delta.finish is not None:
                send_next()
    for index, trace in traces.items():
        check(trace, workload.requests[index])
    return finished_run(workload, list(traces.values()))


def _sequence(index: int, request: Request) -> SequenceRequest:
    return SequenceRequest(
        sequence_id=index,
        prompt_token_ids=list(request.prompt_token_ids),
        sampling=Sampling(temperature=0),
        stopping=Stopping(max_tokens=request.output_tokens, ignore_eos=True),
    )
