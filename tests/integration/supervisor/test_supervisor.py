"""The supervisor starts in order, restarts what crashes, gives up what cannot run, stops all."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import Callable
from pathlib import Path

import pytest

from meshserve.supervisor.restarts import RestartLimits
from meshserve.supervisor.spec import ProbeError, ProcessSpec, ProcessState, ProcessStatus
from meshserve.supervisor.supervisor import MeshFailedError, Supervisor
from tests.fakes.fake_mesh import fake_spec
from tests.support.process import is_running
from tests.support.waiting import until

QUICK = RestartLimits(first_delay_s=0.05, max_crashes=3)


def supervise(*specs: ProcessSpec, log_dir: Path) -> Supervisor:
    return Supervisor(specs, log_dir, limits=QUICK, reaper_grace_s=0.5)


async def test_processes_start_in_stages_and_stop_in_reverse_order(
    tmp_path: Path, free_port: Callable[[], int]
) -> None:
    ends = tmp_path / "ends"
    seen: list[tuple[str, ProcessState]] = []

    def note(status: ProcessStatus) -> None:
        seen.append((status.name, status.state))

    supervisor = Supervisor(
        [
            fake_spec("store", free_port(), "--ends", str(ends), stage=0),
            fake_spec("a", free_port(), "--ends", str(ends), stage=1),
            fake_spec("b", free_port(), "--ends", str(ends), stage=1),
        ],
        tmp_path,
        on_change=note,
    )
    await supervisor.start()
    pids = [status.pid for status in supervisor.statuses.values()]
    assert all(status.state is ProcessState.HEALTHY for status in supervisor.statuses.values())
    await supervisor.stop()

    assert seen.index(("store", ProcessState.HEALTHY)) < seen.index(("a", ProcessState.STARTING))
    assert ends.read_text().split() == ["b", "a", "store"]
    assert all(status.state is ProcessState.STOPPED for status in supervisor.statuses.values())
    assert not any(is_running(pid or 0) for pid in pids)


async def test_a_killed_process_is_started_again_and_the_others_stay(
    tmp_path: Path, free_port: Callable[[], int]
) -> None:
    supervisor = supervise(
        fake_spec("a", free_port()), fake_spec("b", free_port()), log_dir=tmp_path
    )
    await supervisor.start()
    a, b = supervisor.statuses["a"], supervisor.statuses["b"]
    first_a, first_b = a.pid, b.pid
    assert first_a is not None
    os.kill(first_a, signal.SIGKILL)
    await until(lambda: a.restarts == 1 and a.state is ProcessState.HEALTHY)
    assert a.pid not in (None, first_a)
    assert (b.pid, b.restarts) == (first_b, 0)
    await supervisor.stop()


async def test_a_process_that_keeps_crashing_is_given_up_with_its_last_words(
    tmp_path: Path, free_port: Callable[[], int]
) -> None:
    runs = tmp_path / "runs"
    supervisor = supervise(
        fake_spec("a", free_port(), "--runs", str(runs), "--exit-at-once", "3"),
        log_dir=tmp_path,
    )
    with pytest.raises(MeshFailedError) as caught:
        await supervisor.start()
    await supervisor.stop()

    assert len(runs.read_text().split()) == QUICK.max_crashes + 1
    assert caught.value.failure.exit_code == 3
    assert "exited with code 3" in str(caught.value)
    assert "a cannot go on: the disk is on fire" in caught.value.failure.log_tail
    assert supervisor.statuses["a"].state is ProcessState.FAILED


async def test_the_mesh_goes_on_without_a_process_that_it_can_do_without(
    tmp_path: Path, free_port: Callable[[], int]
) -> None:
    supervisor = supervise(
        fake_spec("a", free_port()),
        fake_spec("pages", free_port(), "--exit-at-once", "3", essential=False),
        log_dir=tmp_path,
    )
    await supervisor.start()
    failing = asyncio.create_task(supervisor.wait_for_failure())
    await until(lambda: supervisor.statuses["pages"].state is ProcessState.FAILED)
    assert supervisor.statuses["a"].state is ProcessState.HEALTHY
    await asyncio.sleep(0)
    assert not failing.done()
    failing.cancel()
    await supervisor.stop()


async def test_a_configuration_error_is_not_tried_again(
    tmp_path: Path, free_port: Callable[[], int]
) -> None:
    runs = tmp_path / "runs"
    supervisor = supervise(
        fake_spec("a", free_port(), "--runs", str(runs), "--exit-at-once", "78"),
        log_dir=tmp_path,
    )
    with pytest.raises(MeshFailedError, match="as it is configured"):
        await supervisor.start()
    await supervisor.stop()
    assert len(runs.read_text().split()) == 1


async def test_a_crash_after_the_start_that_repeats_ends_the_mesh(
    tmp_path: Path, free_port: Callable[[], int]
) -> None:
    supervisor = supervise(
        fake_spec("a", free_port()),
        fake_spec("b", free_port(), "--exit-after-s", "0.3"),
        log_dir=tmp_path,
    )
    await supervisor.start()
    async with asyncio.timeout(20):
        failure = await supervisor.wait_for_failure()
    assert (failure.name, failure.exit_code) == ("b", 7)
    await supervisor.stop()


async def test_a_process_that_is_not_healthy_in_time_fails_the_start(
    tmp_path: Path, free_port: Callable[[], int]
) -> None:
    supervisor = supervise(
        fake_spec("a", free_port(), "--never-listen", start_timeout_s=0.5), log_dir=tmp_path
    )
    with pytest.raises(MeshFailedError, match=r"not healthy within 0\.5 s \(is unreachable\)"):
        await supervisor.start()
    await supervisor.stop()


async def test_a_process_that_no_longer_answers_is_killed_and_started_again(
    tmp_path: Path, free_port: Callable[[], int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("meshserve.supervisor.probes.PROBE_TIMEOUT_S", 0.2)
    supervisor = supervise(
        fake_spec("a", free_port(), "--stop-answering-after-s", "0.5", unresponsive_timeout_s=0.5),
        log_dir=tmp_path,
    )
    await supervisor.start()
    status = supervisor.statuses["a"]
    await until(lambda: status.restarts >= 1)
    assert "did not answer" in status.detail or status.state is not ProcessState.RESTARTING
    await supervisor.stop()


async def test_what_ignores_sigterm_is_killed_with_its_children(
    tmp_path: Path, free_port: Callable[[], int]
) -> None:
    grandchild = tmp_path / "grandchild"
    supervisor = supervise(
        fake_spec(
            "a",
            free_port(),
            "--ignore-sigterm",
            "--grandchild",
            str(grandchild),
            stop_timeout_s=0.3,
        ),
        log_dir=tmp_path,
    )
    await supervisor.start()
    pid = supervisor.statuses["a"].pid
    await supervisor.stop()
    assert not is_running(pid or 0)
    await until(lambda: not is_running(int(grandchild.read_text())))
    assert "SIGKILL" in supervisor.statuses["a"].detail


async def test_a_crash_takes_the_children_of_the_process_with_it(
    tmp_path: Path, free_port: Callable[[], int]
) -> None:
    grandchild = tmp_path / "grandchild"
    supervisor = supervise(
        fake_spec("a", free_port(), "--grandchild", str(grandchild)), log_dir=tmp_path
    )
    await supervisor.start()
    left_over = int(grandchild.read_text())
    pid = supervisor.statuses["a"].pid
    assert pid is not None
    os.kill(pid, signal.SIGKILL)
    await until(lambda: not is_running(left_over))
    await supervisor.stop()


async def test_kill_cuts_a_slow_stop_short(tmp_path: Path, free_port: Callable[[], int]) -> None:
    supervisor = supervise(
        fake_spec("a", free_port(), "--ignore-sigterm", stop_timeout_s=60),
        fake_spec("b", free_port(), "--ignore-sigterm", stop_timeout_s=60),
        log_dir=tmp_path,
    )
    await supervisor.start()
    stopping = asyncio.create_task(supervisor.stop())
    await asyncio.sleep(0.2)
    assert not stopping.done()
    supervisor.kill()
    async with asyncio.timeout(5):
        await stopping


async def test_a_stop_during_the_start_leaves_nothing(
    tmp_path: Path, free_port: Callable[[], int]
) -> None:
    runs = tmp_path / "runs"
    supervisor = supervise(
        fake_spec("a", free_port(), "--never-listen", "--runs", str(runs)), log_dir=tmp_path
    )
    starting = asyncio.create_task(supervisor.start())
    await until(runs.exists)
    starting.cancel()
    await asyncio.gather(starting, return_exceptions=True)
    await supervisor.stop()
    assert not is_running(int(runs.read_text()))


async def test_a_command_that_does_not_exist_is_a_failure_with_its_name(tmp_path: Path) -> None:
    async def probe() -> None:
        raise ProbeError("is unreachable", answered=False)

    supervisor = supervise(
        ProcessSpec("a", ("/no/such/program",), probe, environment=dict(os.environ)),
        log_dir=tmp_path,
    )
    with pytest.raises(MeshFailedError) as caught:
        await supervisor.start()
    await supervisor.stop()
    assert caught.value.failure.log_tail == ("/no/such/program: No such file or directory",)
