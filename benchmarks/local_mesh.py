"""A mesh of its own for a benchmark: `meshserve up` on free ports."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import psutil

SERVICES = ("gateway", "tokenizer", "engine", "cache", "safety")
START_TIMEOUT_S = 180.0
STOP_TIMEOUT_S = 60.0


class LocalMesh:
    """Runs while the `with` block does. `settings` are sections laid over the defaults."""

    def __init__(self, settings: dict[str, Any]) -> None:
        self._directory = tempfile.TemporaryDirectory(prefix="meshserve-bench-")
        self._settings = settings
        self.target = ""
        self.start_s = 0.0
        self.config = Path(self._directory.name) / "meshserve.json"  # JSON is YAML

    def __enter__(self) -> LocalMesh:
        root = Path(self._directory.name)
        ports = free_ports(len(SERVICES) + 1)
        document = {name: dict(section) for name, section in self._settings.items()}
        for name, port in zip(SERVICES, ports, strict=False):
            section = document.setdefault(name, {})
            section["listen"] = f"127.0.0.1:{port}"
            section["metrics_listen"] = None
        document["gateway"]["http_listen"] = None
        document.setdefault("valkey", {})["embedded_port"] = ports[-1]
        self.config.write_text(json.dumps(document), encoding="utf-8")
        self._log = (root / "up.log").open("w+b")
        started = time.perf_counter()
        self._process = subprocess.Popen(
            [
                sys.executable,
                "-m",
                "meshserve",
                "up",
                "--config",
                str(self.config),
                "--no-greeting",
            ],
            stdin=subprocess.DEVNULL,
            stdout=self._log,
            stderr=subprocess.STDOUT,
            env={**os.environ, "MESHSERVE_STATE": str(root / "state")},
        )
        state = root / "state" / "state.json"
        while not _is_ready(state):
            if self._process.poll() is not None or time.perf_counter() - started > START_TIMEOUT_S:
                self._log.seek(0)
                output = self._log.read().decode(errors="replace")
                self.__exit__()
                raise RuntimeError(f"the mesh did not start:\n{output}")
            time.sleep(0.05)
        self.start_s = time.perf_counter() - started
        self.target = f"127.0.0.1:{ports[0]}"
        return self

    def processes(self) -> list[psutil.Process]:
        """Everything that runs for the mesh."""
        return psutil.Process(self._process.pid).children(recursive=True)

    @property
    def pid(self) -> int:
        """The process that started all services."""
        return self._process.pid

    def __exit__(self, *_: object) -> None:
        if self._process.poll() is None:
            self._process.send_signal(signal.SIGINT)
            try:
                self._process.wait(timeout=STOP_TIMEOUT_S)
            except subprocess.TimeoutExpired:
                self._process.kill()
                self._process.wait()
        self._log.close()
        self._directory.cleanup()


def _is_ready(state: Path) -> bool:
    try:
        return bool(json.loads(state.read_text(encoding="utf-8"))["ready"])
    except (OSError, ValueError, KeyError):
        return False


def free_ports(count: int) -> list[int]:
    """Ports that nobody listens on now."""
    sockets = [socket.socket() for _ in range(count)]
    try:
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [each.getsockname()[1] for each in sockets]
    finally:
        for each in sockets:
            each.close()
