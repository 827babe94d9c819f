"""What cannot start says in a few words what is wrong and what to do, and exits with code 78."""

from __future__ import annotations

import os
import resource
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import pytest

from tests.support.ports import free_ports
from tests.support.process import ServiceProcess

EXIT_CONFIGURATION = 78
MAX_LINES = 12


def settings(service: str, **section: Any) -> dict[str, Any]:
    port, metrics_port = free_ports(2)
    own: dict[str, str | None] = {
        "listen": f"127.0.0.1:{port}",
        "metrics_listen": f"127.0.0.1:{metrics_port}",
    }
    if service == "gateway":
        own["http_listen"] = None
    return {service: {**own, **section}}


def last_words(service: str, folder: Path, configuration: dict[str, Any]) -> str:
    """What a service says that does not start: its log after the exit."""
    with ServiceProcess(service, folder, configuration) as process:
        code = process.wait(90)
        log = process.log
    assert code == EXIT_CONFIGURATION, log
    assert "Traceback" not in log, log
    return log


def complaint(log: str) -> str:
    """The part of a log that is for people: the lines that are not records."""
    lines = [line for line in log.splitlines() if line and not line.startswith("{")]
    assert 1 <= len(lines) <= MAX_LINES, log
    return "\n".join(lines)


@contextmanager
def taken_port() -> Iterator[int]:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        yield int(taken.getsockname()[1])


@pytest.mark.parametrize("field", ["listen", "metrics_listen"])
@pytest.mark.parametrize("service", ["gateway", "engine"])
def test_a_port_in_use(tmp_path: Path, service: str, field: str) -> None:
    with taken_port() as port:
        configuration = settings(service, **{field: f"127.0.0.1:{port}"})
        words = complaint(last_words(service, tmp_path, configuration))
    assert f"127.0.0.1:{port}" in words
    assert f"{service}.{field}" in words, "the way out names the setting"


def test_an_unknown_key_is_told_its_nearest(tmp_path: Path) -> None:
    configuration = settings("gateway", max_active_request=3)
    words = complaint(last_words("gateway", tmp_path, configuration))
    assert "gateway.max_active_request" in words
    assert "max_active_requests" in words
    assert "gateway.yaml" in words


@pytest.mark.parametrize("section", [{"listen": "0.0.0.0:0"}, {"auth": {"mode": "required"}}])
def test_a_gateway_that_nobody_could_call(tmp_path: Path, section: dict[str, Any]) -> None:
    words = complaint(last_words("gateway", tmp_path, settings("gateway", **section)))
    assert "gateway.auth.keys is empty" in words
    assert "gateway.auth.mode: off" in words


def test_an_override_in_the_environment_that_makes_no_sense(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MESHSERVE_GATEWAY__DEFAULT_TIMEOUT_S", "soon")
    words = complaint(last_words("gateway", tmp_path, settings("gateway")))
    assert "default_timeout_s" in words.lower()
    monkeypatch.delenv("MESHSERVE_GATEWAY__DEFAULT_TIMEOUT_S")
    monkeypatch.setenv("MESHSERVE_GATEWAY__DEFAULT_TIMOUT_S", "3")
    words = complaint(last_words("gateway", tmp_path, settings("gateway")))
    assert "MESHSERVE_GATEWAY__DEFAULT_TIMOUT_S" in words or "default_timout_s" in words
    assert "default_timeout_s" in words.lower()


def truncated(model: Path, target: Path) -> None:
    with model.open("rb") as source:
        target.write_bytes(source.read(8 * 2**20))


def header_only_half(model: Path, target: Path) -> None:
    with model.open("rb") as source:
        target.write_bytes(source.read(1000))


def wrong_magic(model: Path, target: Path) -> None:
    with model.open("rb") as source:
        target.write_bytes(b"FUGG" + source.read(2**20)[4:])


def absurd_counts(model: Path, target: Path) -> None:
    with model.open("rb") as source:
        head = source.read(2**20)
    target.write_bytes(head[:8] + b"\xff" * 16 + head[24:])


def empty(model: Path, target: Path) -> None:
    target.touch()


DAMAGES = (header_only_half, wrong_magic, absurd_counts, empty)


@pytest.mark.parametrize(
    ("service", "damage"),
    [
        *(("tokenizer", damage) for damage in DAMAGES),
        # The weights, which the engine alone reads, come last in the file.
        *(("engine", damage) for damage in (*DAMAGES, truncated)),
    ],
)
def test_a_damaged_model_file(
    tmp_path: Path,
    demo_model_path: Path,
    service: str,
    damage: Callable[[Path, Path], None],
) -> None:
    broken = tmp_path / "broken.gguf"
    damage(demo_model_path, broken)
    configuration = {**settings(service), "models": {"broken": {"source": str(broken)}}}
    words = complaint(last_words(service, tmp_path, configuration))
    assert "broken.gguf" in words


@pytest.mark.parametrize("service", ["tokenizer", "engine"])
def test_a_model_that_is_not_there(tmp_path: Path, service: str) -> None:
    configuration = {
        **settings(service),
        "models": {"gone": {"source": str(tmp_path / "gone.gguf")}},
    }
    assert "gone.gguf" in complaint(last_words(service, tmp_path, configuration))
    configuration = {**settings(service), "model_cache": str(tmp_path / "empty")}
    words = complaint(last_words(service, tmp_path, configuration))
    assert "smollm2-135m" in words
    assert "meshserve models pull" in words


# --- no room


@contextmanager
def small_disk(folder: Path) -> Iterator[tuple[Path, Callable[[], None] | None]]:
    """A directory with a mebibyte of room, and what a process does first where it could not be
    mounted: it takes the limit upon itself."""
    folder.mkdir()
    with ExitStack() as stack:
        mounted = subprocess.run(
            ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(folder)],
            capture_output=True,
            check=False,
        )
        if mounted.returncode == 0:
            stack.callback(subprocess.run, ["umount", str(folder)], check=True)
            yield folder, None
            return
        yield folder, lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (2**20, 2**20))


def meshserve(
    *arguments: str, before: Callable[[], None] | None, **environment: str
) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "meshserve", *arguments],
        env={**os.environ, **environment},
        preexec_fn=before,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=120,
        check=False,
    )


@pytest.mark.parametrize("already_full", [False, True])
def test_no_room_for_a_model(tmp_path: Path, already_full: bool) -> None:
    with small_disk(tmp_path / "disk") as (disk, before):
        if already_full and before is None:
            with pytest.raises(OSError, match="No space left"):
                (disk / "filler").write_bytes(bytes(2**21))
        done = meshserve("models", "pull", "smollm2-135m", before=before, MESHSERVE_CACHE=str(disk))
        left = [path for path in (disk / "models").rglob("*") if path.is_file()]
    assert done.returncode == 1
    assert "Traceback" not in done.stdout
    if before is None:
        assert "disk is full" in done.stdout
        assert "MESHSERVE_CACHE" in done.stdout
    assert [path.name for path in left] == [".lock"], "nothing half is left behind"


def test_no_room_for_the_state_of_a_mesh(tmp_path: Path, demo_model_path: Path) -> None:
    with small_disk(tmp_path / "disk") as (disk, before):
        if before is None:
            with pytest.raises(OSError, match="No space left"):
                (disk / "filler").write_bytes(bytes(2**21))
        else:
            pytest.xfail("a limit on files' sizes is no full disk, and no disk can be mounted here")
        done = meshserve("up", "--no-greeting", before=before, MESHSERVE_STATE=str(disk / "state"))
    assert done.returncode not in (0, None)
    assert "No space left on device" in done.stdout
    assert str(disk) in done.stdout
    assert "Traceback" not in done.stdout
