"""The closed loop keeps as many requests open as it should, and believes no server blindly."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
from collections.abc import Callable

import pytest

from benchmarks import load
from benchmarks.load import BenchmarkError, run_workload
from benchmarks.memory import PeakMemory, descendants, tree_bytes
from benchmarks.workloads import Request, Workload


class FakeClient:
    """Answers after a moment, and knows how many were open at a time."""

    def __init__(self, lost_tokens: int = 0, delay_s: float = 0.001) -> None:
        self.open = 0
        self.most_open = 0
        self.lost_tokens = lost_tokens
        self.delay_s = delay_s

    async def generate(self, request: Request, arrived: Callable[[], None]) -> int:
        self.open += 1
        self.most_open = max(self.most_open, self.open)
        await asyncio.sleep(self.delay_s)
        arrived()
        self.open -= 1
        return request.output_tokens - self.lost_tokens


def workload(concurrency: int, requests: int) -> Workload:
    return Workload("W", concurrency, (Request((1, 2, 3), 5),) * requests)


async def test_as_many_requests_are_open_as_the_workload_says() -> None:
    client = FakeClient()

    run = await run_workload(client, workload(concurrency=4, requests=20))

    assert client.most_open == 4
    assert len(run.traces) == 20
    assert run.output_tokens == 100
    assert run.output_tokens_per_s == pytest.approx(100 / run.duration_s)


async def test_an_answer_of_another_length_is_no_figure() -> None:
    with pytest.raises(ExceptionGroup) as failed:
        await run_workload(FakeClient(lost_tokens=1), workload(2, 4))

    assert failed.group_contains(BenchmarkError, match="4 tokens in 1 messages")


async def test_a_server_that_hangs_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(load, "TIMEOUT_S", 0.05)

    with pytest.raises(BenchmarkError, match="not done within"):
        await run_workload(FakeClient(delay_s=60), workload(1, 1))


def test_memory_is_that_of_the_whole_process_tree() -> None:
    # A parent that holds little, whose child holds 64 MiB and says so.
    held = 64 << 20
    child = f"import sys; a = bytearray({held}); print('held', flush=True); sys.stdin.read()"
    parent = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {child!r}])"
    with subprocess.Popen(
        [sys.executable, "-c", parent], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"held\n"
        with PeakMemory(process.pid) as memory:
            pass
        assert len(descendants(process.pid)) == 2
        assert held < memory.peak_bytes < held + (64 << 20)
        process.communicate()
    assert tree_bytes(process.pid) == 0
    assert tree_bytes(os.getpid()) > 0
