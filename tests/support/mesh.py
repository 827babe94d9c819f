"""A real mesh on this machine: `meshserve up` with ports, state and settings of its own."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import grpc
import psutil
import yaml
from grpc_health.v1 import health_pb2, health_pb2_grpc

import meshserve
from tests.support.ports import free_ports

SERVICES = ("gateway", "tokenizer", "engine", "cache", "safety")
START_TIMEOUT_S = 180.0


class Mesh:
    """Starts with `start`, or as a context manager. `overrides` are laid over the settings, and
    `flags` are those of `meshserve up`."""

    def __init__(
        self, directory: Path, overrides: dict[str, Any] | None = None, flags: Sequence[str] = ()
    ) -> None:
        self.flags = tuple(flags)
        self.directory = directory
        self.state = directory / "state"
        ports = free_ports(2 * len(SERVICES) + 2)
        self.ports = dict(zip(SERVICES, ports, strict=False))
        self.metrics_ports = dict(zip(SERVICES, ports[len(SERVICES) :], strict=False))
        self.http_port = ports[-2]
        self.settings: dict[str, Any] = {
            # float32 makes an answer independent of what else is in the batch.
            "models": {
                "smollm2-135m": {
                    "source": "smollm2-135m",
                    "aliases": ["demo"],
                    "dtype": "float32",
                    "context_tokens": 2048,
                }
            },
            "valkey": {"embedded_port": ports[-1]},
            "engine": {"kv_cache_bytes": 256 * 2**20},
        }
        for name in SERVICES:
            section = self.settings.setdefault(name, {})
            section["listen"] = f"127.0.0.1:{self.ports[name]}"
            section["metrics_listen"] = f"127.0.0.1:{self.metrics_ports[name]}"
            section["drain_timeout_s"] = 10
        self.settings["gateway"]["http_listen"] = f"127.0.0.1:{self.http_port}"
        _merge(self.settings, overrides or {})
        self.target = f"127.0.0.1:{self.ports['gateway']}"
        self._process: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> Mesh:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    @property
    def config(self) -> Path:
        return self.directory / "meshserve.yaml"

    @property
    def environment(self) -> dict[str, str]:
        return {**os.environ, "MESHSERVE_STATE": str(self.state)}

    def start(self) -> None:
        self.directory.mkdir(parents=True, exist_ok=True)
        self.config.write_text(yaml.safe_dump(self.settings))
        with (self.directory / "up.log").open("ab") as log:
            self._process = subprocess.Popen(
                [
                    *[sys.executable, "-m", "meshserve", "up"],
                    *["--config", str(self.config), "--no-greeting", *self.flags],
                ],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=self.environment,
            )
        self.wait_until_ready()

    def stop(self) -> int:
        """Ends the mesh as Ctrl-C does, and returns the exit code."""
        assert self._process is not None
        if self._process.poll() is None:
            self._process.send_signal(signal.SIGINT)
            try:
                self._process.wait(timeout=60)
            except subprocess.TimeoutExpired:
                self._process.kill()
                self._process.wait()
        return self._process.returncode

    def wait_until_ready(self, timeout_s: float = START_TIMEOUT_S) -> None:
        deadline = time.monotonic() + timeout_s
        while not all(self.healthy(name) for name in SERVICES):
            assert self._process is not None
            if self._process.poll() is not None:
                raise AssertionError(f"meshserve up ended:\n{self.logs()}")
            if time.monotonic() > deadline:
                raise AssertionError(f"the mesh is not healthy:\n{self.logs()}")
            time.sleep(0.1)

    def healthy(self, service: str) -> bool:
        with grpc.insecure_channel(f"127.0.0.1:{self.ports[service]}") as channel:
            try:
                answer = health_pb2_grpc.HealthStub(channel).Check(
                    health_pb2.HealthCheckRequest(), timeout=1
                )
            except grpc.RpcError:
                return False
        return bool(answer.status == health_pb2.HealthCheckResponse.SERVING)

    def process(self, service: str) -> psutil.Process:
        """The process of a service, or "valkey"."""
        assert self._process is not None
        wanted = f"services.{service}"
        for child in psutil.Process(self._process.pid).children(recursive=True):
            try:
                command = child.cmdline()
            except psutil.NoSuchProcess:
                continue
            if wanted in command or (service == "valkey" and "valkey-server" in command[0]):
                return child
        raise LookupError(f"no process of {service}")

    def client(self, **options: Any) -> meshserve.Client:
        return meshserve.Client(self.target, **options)

    def async_client(self, **options: Any) -> meshserve.AsyncClient:
        return meshserve.AsyncClient(self.target, **options)

    def channel(self, service: str = "gateway") -> grpc.Channel:
        return grpc.insecure_channel(
            f"127.0.0.1:{self.ports[service]}",
            options=[
                ("grpc.max_send_message_length", -1),
                ("grpc.max_receive_message_length", -1),
            ],
        )

    def metrics(self, service: str) -> str:
        url = f"http://127.0.0.1:{self.metrics_ports[service]}/metrics"
        with urllib.request.urlopen(url, timeout=5) as response:
            return str(response.read().decode())

    def metric(self, service: str, name: str, **labels: str) -> float:
        """Sum over the series of a metric that have these labels."""
        total = 0.0
        for line in self.metrics(service).splitlines():
            series, _, value = line.rpartition(" ")
            if series.partition("{")[0] == name and all(
                f'{key}="{wanted}"' in series for key, wanted in labels.items()
            ):
                total += float(value)
        return total

    def logs(self, lines: int = 15) -> str:
        """The last lines of all logs, for a failed test."""
        parts = []
        for log in [self.directory / "up.log", *sorted((self.state / "logs").glob("*.log"))]:
            if log.exists():
                tail = log.read_text(errors="replace").splitlines()[-lines:]
                parts.append("\n".join([f"== {log.name}", *tail]))
        return "\n".join(parts)

    def log_records(self, service: str) -> list[dict[str, Any]]:
        """The JSON log of a service; lines that are not JSON are left out."""
        records = []
        for line in (self.state / "logs" / f"{service}.log").read_text().splitlines():
            try:
                records.append(json.loads(line))
            except json.JSONDecodeError:
                continue
        return records


def _merge(base: dict[str, Any], over: dict[str, Any]) -> None:
    for key, value in over.items():
        if isinstance(value, dict) and isinstance(base.get(key), dict):
            _merge(base[key], value)
        else:
            base[key] = value
