"""What each process of the mesh takes is told apart and added up."""

from __future__ import annotations

import subprocess
import sys

import pytest

from benchmarks.mesh_memory import Memory, process_name, snapshot, table

MIB = 1 << 20


@pytest.mark.parametrize(
    ("command", "name"),
    [
        (["python", "-m", "meshserve", "up", "--config", "x.yaml"], "supervisor"),
        (["python", "-m", "services.gateway", "--config", "x.yaml"], "gateway"),
        (["python", "-m", "services.engine.core.process", "20"], "engine core"),
        (["python", "-I", "-S", "/meshserve/supervisor/reaper.py", "5.0"], "reaper"),
        (["/bin/valkey-server 127.0.0.1:6379", "", ""], "valkey-server"),
    ],
)
def test_processes_have_the_names_of_what_they_do(command: list[str], name: str) -> None:
    assert process_name(command) == name


def test_memory_of_a_process_is_found_below_its_parent() -> None:
    script = "import sys; held = b'x' * (64 << 20); print('held', flush=True); sys.stdin.read()"
    parent = "import subprocess, sys; subprocess.run([sys.executable, '-c', sys.argv[1]])"
    with subprocess.Popen(
        [sys.executable, "-c", parent, script], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as process:
        assert process.stdout is not None
        process.stdout.readline()
        found = snapshot(process.pid)
        process.communicate()
    (memory,) = found.values()  # both are called by the interpreter's name
    assert 64 * MIB <= memory.own < 128 * MIB
    assert memory.files > 0


def test_a_process_has_a_line_and_all_have_another() -> None:
    start = {"gateway": Memory(40 * MIB, 8 * MIB)}
    later = {"gateway": Memory(50 * MIB, 8 * MIB), "engine core": Memory(900 * MIB, 60 * MIB)}
    assert table({"start": start, "W1": later}).splitlines() == [
        "              start      W1     own   files",
        "engine core     0.0   960.0   900.0    60.0",
        "gateway        48.0    58.0    50.0     8.0",
        "all            48.0  1018.0   950.0    68.0",
    ]
