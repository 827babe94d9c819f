"""`meshserve up` as a process: signals, the end of a service, the end of the supervisor itself."""

from __future__ import annotations

import contextlib
import fcntl
import os
import pty
import select
import shlex
import signal
import subprocess
import sys
import termios
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from meshserve.cli.main import run
from meshserve.supervisor.statedir import StateDir
from tests.support.process import is_running
from tests.support.waiting import wait_until

FAKE_MESH = Path(__file__).parents[2] / "fakes" / "fake_mesh.py"
REPOSITORY = Path(__file__).parents[3]


class FakeMesh:
    """Two fake services under a supervisor in a process of its own."""

    def __init__(self, directory: Path, ports: list[int]) -> None:
        self.state = StateDir(directory / "state")
        self.runs = directory / "runs"
        self.ends = directory / "ends"
        self._ports = [str(port) for port in ports]
        self.process: subprocess.Popen[str] | None = None

    def start(
        self, *flags: str, shell_line: str | None = None, **popen: object
    ) -> subprocess.Popen[str]:
        flags = ("--runs", str(self.runs), "--ends", str(self.ends), *flags)
        environment = {**os.environ, "PYTHONPATH": str(REPOSITORY), "TERM": "xterm"}
        settings: dict[str, object] = {
            "stdin": subprocess.DEVNULL,
            "stdout": subprocess.PIPE,
            "stderr": subprocess.STDOUT,
            **popen,
        }
        command = [sys.executable, str(FAKE_MESH), str(self.state.path), *self._ports]
        command += ["--", *flags]
        if shell_line is not None:
            command = ["bash", "-c", shell_line.format(command=shlex.join(command))]
        self.process = subprocess.Popen(  # type: ignore[call-overload]
            command,
            text=True,
            env=environment,
            **settings,
        )
        return self.process

    def wait_until_ready(self) -> None:
        def ready() -> bool:
            mesh = self.state.running_mesh()
            return mesh is not None and mesh.ready

        wait_until(ready, "the mesh is ready")

    def children(self) -> list[int]:
        """Every process below the supervisor: its services and its reaper."""
        assert self.process is not None
        path = f"/proc/{self.process.pid}/task/{self.process.pid}/children"
        return [int(pid) for pid in Path(path).read_text().split()]


@pytest.fixture
def mesh(tmp_path: Path, free_port: Callable[[], int]) -> Iterator[FakeMesh]:
    made = FakeMesh(tmp_path, [free_port(), free_port()])
    yield made
    if made.process is not None and made.process.poll() is None:
        made.process.kill()
        made.process.wait()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_stops_everything_in_good_order(mesh: FakeMesh, number: signal.Signals) -> None:
    process = mesh.start()
    mesh.wait_until_ready()
    children = mesh.children()
    assert len(children) == 3
    process.send_signal(number)
    output, _ = process.communicate(timeout=30)
    assert process.returncode == 0, output
    assert mesh.ends.read_text() == "s1\n"
    assert not any(is_running(pid) for pid in children)
    assert not mesh.state.is_held()
    assert output.index("s1        stopped") < output.index("s0        stopped")


def test_a_signal_during_the_start_stops_it(mesh: FakeMesh) -> None:
    process = mesh.start("--never-listen")
    wait_until(mesh.runs.exists, "the service has started")
    wait_until(lambda: mesh.state.running_mesh() is not None, "the state is written")
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=30)
    assert process.returncode == 0
    assert not is_running(int(mesh.runs.read_text()))


def test_a_second_signal_kills(mesh: FakeMesh) -> None:
    process = mesh.start("--ignore-sigterm")
    mesh.wait_until_ready()
    children = mesh.children()
    started = time.monotonic()
    process.send_signal(signal.SIGINT)
    time.sleep(0.3)
    assert process.poll() is None
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=30)
    assert time.monotonic() - started < 30  # the service alone would have been given 60 s
    assert not any(is_running(pid) for pid in children)


def test_a_service_that_is_dead_for_good_ends_the_mesh_with_its_last_words(mesh: FakeMesh) -> None:
    process = mesh.start("--exit-at-once", "78")
    output, _ = process.communicate(timeout=30)
    assert process.returncode == 1
    assert "s1 cannot run as it is configured (exited with code 78)." in output
    assert "s1 cannot go on: the disk is on fire" in output
    assert "run `meshserve up` again" in output
    assert "Traceback" not in output


@pytest.mark.parametrize("flags", [(), ("--ignore-sigterm",)])
def test_sigkill_of_the_supervisor_leaves_no_orphans(
    mesh: FakeMesh, tmp_path: Path, flags: tuple[str, ...]
) -> None:
    grandchild = tmp_path / "grandchild"
    process = mesh.start("--grandchild", str(grandchild), *flags)
    mesh.wait_until_ready()
    left = [*mesh.children(), int(grandchild.read_text())]
    assert len(left) == 4
    process.kill()
    process.wait()
    wait_until(lambda: not any(is_running(pid) for pid in left), "nothing is left")
    assert not mesh.state.is_held()


def test_sigkill_of_supervisor_and_reaper_ends_the_services_all_the_same(mesh: FakeMesh) -> None:
    process = mesh.start()
    mesh.wait_until_ready()
    services = []
    for pid in mesh.children():
        if b"reaper.py" in Path(f"/proc/{pid}/cmdline").read_bytes():
            os.kill(pid, signal.SIGKILL)
        else:
            services.append(pid)
    assert len(services) == 2
    process.kill()
    process.wait()
    wait_until(lambda: not any(is_running(pid) for pid in services), "the services have ended")


def test_logs_are_shown_from_the_start_when_asked_for(
    mesh: FakeMesh, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FAKE_MESH_LOGS", "1")
    process = mesh.start()
    mesh.wait_until_ready()
    process.send_signal(signal.SIGINT)
    output, _ = process.communicate(timeout=30)
    assert "s0        s0 starts" in output
    assert "s1        s1 starts" in output


def test_a_mesh_whose_reader_is_gone_serves_on(mesh: FakeMesh) -> None:
    process = mesh.start()
    assert process.stdout is not None
    process.stdout.close()
    mesh.wait_until_ready()
    first = [int(pid) for pid in mesh.runs.read_text().split()]
    os.kill(first[-1], signal.SIGKILL)
    wait_until(lambda: len(mesh.runs.read_text().split()) == 2, "the service is started again")
    assert process.poll() is None
    process.send_signal(signal.SIGTERM)
    assert process.wait(30) == 0


def test_down_finds_and_stops_the_mesh(
    mesh: FakeMesh, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("MESHSERVE_STATE", str(mesh.state.path))
    process = mesh.start()
    mesh.wait_until_ready()
    reaped = threading.Thread(target=process.wait)
    reaped.start()
    assert run(["down"]) == 0
    assert "has stopped" in capsys.readouterr().out
    reaped.join(5)
    assert process.returncode == 0
    assert run(["down"]) == 0
    assert "No mesh is running" in capsys.readouterr().out


def test_a_second_up_names_the_first(
    mesh: FakeMesh, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("MESHSERVE_STATE", str(mesh.state.path))
    process = mesh.start()
    mesh.wait_until_ready()
    assert run(["up"]) == 3
    shown = capsys.readouterr().err
    assert f"running already (process {process.pid}" in shown
    assert "meshserve down" in shown
    assert process.poll() is None


def test_a_mesh_in_the_background_of_a_terminal_serves_on(mesh: FakeMesh) -> None:
    controller, terminal = pty.openpty()
    process = mesh.start(
        stdin=terminal,
        stdout=terminal,
        stderr=terminal,
        preexec_fn=take_terminal,
        shell_line="set -m; {command} & wait",
    )
    os.close(terminal)
    threading.Thread(target=drain, args=(controller,), daemon=True).start()
    mesh.wait_until_ready()
    running = mesh.state.running_mesh()
    assert running is not None
    state = Path(f"/proc/{running.pid}/stat").read_text().rpartition(")")[2].split()[0]
    assert state in "SR"  # T would mean that the terminal stopped it
    os.kill(running.pid, signal.SIGTERM)
    wait_until(lambda: not mesh.state.is_held(), "the mesh has stopped")
    process.wait(30)


def take_terminal() -> None:
    """Makes standard input the controlling terminal of a new session."""
    os.setsid()
    fcntl.ioctl(0, termios.TIOCSCTTY, 0)


def drain(controller: int) -> None:
    """Reads what nobody looks at, so that its writer is not held up."""
    with contextlib.suppress(OSError):
        while os.read(controller, 65536):
            pass


def test_on_a_terminal_a_table_shows_the_services_and_l_the_logs(mesh: FakeMesh) -> None:
    controller, terminal = pty.openpty()
    process = mesh.start(stdin=terminal, stdout=terminal, stderr=terminal, preexec_fn=take_terminal)
    os.close(terminal)
    seen = ""

    def read_available() -> str:
        ready = select.select([controller], [], [], 0.3)[0]
        return os.read(controller, 65536).decode("utf-8", "replace") if ready else ""

    def read_until(text: str) -> None:
        nonlocal seen
        deadline = time.monotonic() + 20
        while text not in seen:
            assert time.monotonic() < deadline, f"{text!r} not in {seen!r}"
            seen += read_available()

    read_until("Ctrl-C stops, l shows or hides the logs")
    assert "s0" in seen
    assert "healthy" in seen
    os.write(controller, b"l")
    record = '{"time": "2026-01-01T12:00:00", "level": "info", "message": "a log line"}\n'
    deadline = time.monotonic() + 20
    while "a log line" not in seen:
        assert time.monotonic() < deadline, seen
        with (mesh.state.log_dir / "s1.log").open("a") as log:
            log.write(record)
        seen += read_available()
    os.write(controller, b"\x03")
    read_until("stopping")
    process.wait(30)
    assert process.returncode == 0
    os.close(controller)
