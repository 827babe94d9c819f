"""What the system says of processes that want a processor and do not get one."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from services.engine.starvation import ProcessorWait

pytestmark = pytest.mark.skipif(
    not os.path.exists("/proc/self/schedstat"), reason="Linux counts it, where it is built to"
)
BUSY = "import os; os.sched_setaffinity(0, {%d}); print(flush=True)\nwhile True: pass"
IDLE = "print(flush=True); import time; time.sleep(600)"


@contextmanager
def running(script: str) -> Iterator[int]:
    command = [sys.executable, "-c", script]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        process.stdout.readline()
        try:
            yield process.pid
        finally:
            process.kill()


def waited_share(pid: int, seconds: float = 0.5) -> float:
    wait = ProcessorWait(pid)
    started_s = time.monotonic()
    time.sleep(seconds)
    return wait.seconds() / (time.monotonic() - started_s)


def test_three_on_one_processor_wait_most_of_the_time() -> None:
    busy = BUSY % min(os.sched_getaffinity(0))
    with running(busy) as pid, running(busy), running(busy):
        assert 0.4 < waited_share(pid, 1.0) < 1.1


def test_one_that_wants_no_processor_waits_for_none() -> None:
    with running(IDLE) as pid:
        assert waited_share(pid) < 0.1


def test_one_that_is_gone_waits_for_nothing() -> None:
    with running(IDLE) as pid:
        wait = ProcessorWait(pid)
    assert wait.seconds() == 0
