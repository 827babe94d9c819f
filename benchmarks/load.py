"""The one measurement loop: a workload through any client, and when its tokens came."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Protocol

from benchmarks.workloads import Request, Workload

# Ten times what the slowest system takes for the longest workload: one that hangs must not keep
# the others from being measured.
TIMEOUT_S = 120.0


@dataclass(slots=True)
class Trace:
    """What one request's reader saw. Times are seconds on the clock of `time.perf_counter`."""

    sent_s: float
    message_s: list[float] = field(default_factory=list)  # arrivals of messages with tokens
    output_tokens: int = 0  # as the server accounts for them, not as messages are counted

    def arrived(self) -> None:
        """Notes that a message with tokens has just come."""
        self.message_s.append(time.perf_counter())

    @property
    def first_token_s(self) -> float:
        """Time to first token."""
        return self.message_s[0] - self.sent_s

    @property
    def end_to_end_s(self) -> float:
        """Until the last token."""
        return self.message_s[-1] - self.sent_s

    @property
    def gaps_s(self) -> list[float]:
        """Inter-token latency as a reader feels it: the wait before each message but the first."""
        return [
            late - early for early, late in zip(self.message_s, self.message_s[1:], strict=False)
        ]

    @property
    def per_token_s(self) -> float:
        """Mean time per output token after the first; 0 for an answer of one token."""
        if self.output_tokens < 2:
            return 0.0
        return (self.message_s[-1] - self.message_s[0]) / (self.output_tokens - 1)


@dataclass(frozen=True, slots=True)
class Run:
    """One workload, done once. The duration is from the first request sent to the last token."""

    workload: str
    duration_s: float
    traces: list[Trace]

    @property
    def output_tokens(self) -> int:
        """Tokens of all requests."""
        return sum(trace.output_tokens for trace in self.traces)

    @property
    def output_tokens_per_s(self) -> float:
        """Throughput."""
        return self.output_tokens / self.duration_s


class Client(Protocol):
    """One way to ask a server for a completion."""

    async def generate(self, request: Request, arrived: Callable[[], None]) -> int:
        """Streams a completion, calls `arrived` for each message that brings tokens.

        Returns:
            the number of output tokens that the server says it gave.

        Raises:
            BenchmarkError: the server refused, failed or ended early.
        """
        ...


class BenchmarkError(Exception):
    """A system did not do what was asked, so that it has no figure."""


async def run_workload(client: Client, workload: Workload) -> Run:
    """Keeps `workload.concurrency` requests open until all are done.

    Raises:
        BenchmarkError: a request failed or gave another number of tokens than asked for; equal work
            is what makes figures comparable.
    """
    pending = iter(workload.requests)
    traces: list[Trace] = []

    async def work() -> None:
        for request in pending:
            trace = Trace(sent_s=time.perf_counter())
            traces.append(trace)
            trace.output_tokens = await client.generate(request, trace.arrived)
            check(trace, request)

    try:
        async with asyncio.timeout(TIMEOUT_S), asyncio.TaskGroup() as tasks:
            for _ in range(workload.concurrency):
                tasks.create_task(work())
    except TimeoutError:
        raise BenchmarkError(f"{workload.name} was not done within {TIMEOUT_S:g} s") from None
    return finished_run(workload, traces)


def check(trace: Trace, request: Request) -> None:
    """Raises BenchmarkError unless the request gave exactly what it should have."""
    if trace.output_tokens != request.output_tokens or not trace.message_s:
        raise BenchmarkError(
            f"{trace.output_tokens} tokens in {len(trace.message_s)} messages came out, "
            f"{request.output_tokens} should have"
        )


def finished_run(workload: Workload, traces: list[Trace]) -> Run:
    """A run from its traces."""
    started_s = min(trace.sent_s for trace in traces)
    ended_s = max(trace.message_s[-1] for trace in traces)
    return Run(workload.name, ended_s - started_s, traces)
