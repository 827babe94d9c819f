"""The Docker engine that the tests use: the one that runs, or where none does, one of their own.

    python -m tests.compose.docker_engine

says whether there is one, or why not.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

START_TIMEOUT_S = 60.0
STOP_TIMEOUT_S = 60.0


class NoEngineError(Exception):
    """There is no engine, and none can be started."""


@contextmanager
def docker_engine() -> Iterator[dict[str, str]]:
    """The environment in which `docker` and Compose find an engine. Raises NoEngineError."""
    if shutil.which("docker") is None:
        raise NoEngineError("docker is not installed: apt-get install docker.io docker-compose")
    if _answers(dict(os.environ)):
        yield dict(os.environ)
        return
    if os.geteuid() != 0 or shutil.which("dockerd") is None:
        raise NoEngineError("no Docker engine runs; only root can start one, with dockerd")
    # Short: the engine makes sockets in it, whose paths may not be long.
    folder = Path(tempfile.mkdtemp(prefix="dockerd-", dir="/tmp"))
    try:
        yield from _own_engine(folder)
    finally:
        _unmount_below(folder)
        shutil.rmtree(folder, ignore_errors=True)


def _own_engine(folder: Path) -> Iterator[dict[str, str]]:
    environment = {**os.environ, "DOCKER_HOST": f"unix://{folder}/docker.sock"}
    command = ["dockerd", "--host", environment["DOCKER_HOST"]]
    for option in ("data-root", "exec-root", "pidfile"):
        command += [f"--{option}", str(folder / option)]
    with (folder / "log").open("wb") as log:
        process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True
        )
    try:
        deadline = time.monotonic() + START_TIMEOUT_S
        while not _answers(environment):
            if process.poll() is not None or time.monotonic() > deadline:
                tail = (folder / "log").read_text(errors="replace")[-2000:]
                raise NoEngineError(f"dockerd does not come up:\n{tail}")
            time.sleep(0.2)
        yield environment
    finally:
        if process.poll() is None:
            process.send_signal(signal.SIGTERM)
            try:
                process.wait(STOP_TIMEOUT_S)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def _unmount_below(folder: Path) -> None:
    """dockerd leaves the name of its own network namespace mounted."""
    mounts = [line.split()[1] for line in Path("/proc/mounts").read_text().splitlines()]
    for mount in sorted((each for each in mounts if each.startswith(f"{folder}/")), reverse=True):
        subprocess.run(["umount", mount], check=False, capture_output=True)


def _answers(environment: dict[str, str]) -> bool:
    command = ["docker", "version", "--format", "{{.Server.Version}}"]
    return subprocess.run(command, env=environment, capture_output=True).returncode == 0


if __name__ == "__main__":
    try:
        with docker_engine():
            pass
    except NoEngineError as error:
        sys.exit(str(error))
