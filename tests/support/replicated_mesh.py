"""A mesh with several replicas of each service, found by names whose addresses a test changes.

Each replica is a process on a loopback address of its own, with the port that its service has
everywhere, as containers have it. The engines run paced cores, which leave the processors to what
is tested.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
import urllib.request
from pathlib import Path
from typing import Any

import grpc
import yaml
from grpc_health.v1 import health_pb2, health_pb2_grpc

from benchmarks import paced_core
from services.runtime.valkey import EmbeddedValkey
from tests.support.ports import free_ports

MODULES = {
    "tokenizer": "services.tokenizer",
    "safety": "services.safety",
    "cache": "services.cache",
    "engine": "benchmarks.paced_engine",
    "gateway": "tests.fakes.gateway_with_names",
}
PEERS = ("tokenizer", "safety", "cache", "engine")
MODEL = "smollm2-135m"
STEP_MS = 15.0
START_TIMEOUT_S = 120.0


class Replica:
    """One process of a service."""

    def __init__(self, mesh: ReplicatedMesh, service: str, host: str) -> None:
        self.service = service
        self.host = host
        self._mesh = mesh
        self.address = f"{host}:{mesh.ports[service]}"
        self._metrics = f"http://{host}:{mesh.metrics_ports[service]}/metrics"
        settings = json.loads(json.dumps(mesh.settings))
        settings[service]["listen"] = self.address
        settings[service]["metrics_listen"] = f"{host}:{mesh.metrics_ports[service]}"
        name = f"{service}-{host}"
        config = mesh.directory / f"{name}.yaml"
        config.write_text(yaml.safe_dump(settings))
        self._log = mesh.directory / f"{name}.log"
        with self._log.open("ab") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", MODULES[service], "--config", str(config)],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=mesh.environment,
            )

    @property
    def log(self) -> str:
        return self._log.read_text(errors="replace")

    def wait_until_healthy(self) -> None:
        give_up_at = time.monotonic() + START_TIMEOUT_S
        with self._mesh.channel(self) as channel:
            check = health_pb2_grpc.HealthStub(channel).Check
            while True:
                assert self.process.poll() is None, self.log
                assert time.monotonic() < give_up_at, self.log
                try:
                    answer = check(health_pb2.HealthCheckRequest(), timeout=2, wait_for_ready=True)
                    if answer.status == health_pb2.HealthCheckResponse.SERVING:
                        return
                except grpc.RpcError:
                    pass
                time.sleep(0.05)

    def calls(self, method: str = "") -> float:
        """How many calls it has answered, of methods whose name ends like this."""
        return self.metric("meshserve_rpc_server_calls_total", f'{method}"')

    def metric(self, name: str, labels: str = "") -> float:
        """Sum over the series of a metric with this among their labels."""
        with urllib.request.urlopen(self._metrics, timeout=5) as response:
            lines = response.read().decode().splitlines()
        return sum(
            float(line.rpartition(" ")[2])
            for line in lines
            if line.startswith((f"{name}{{", f"{name} ")) and labels in line
        )

    def stop(self) -> None:
        """Asks it to end, as Docker and Kubernetes do."""
        self.process.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()

    def ended(self, timeout_s: float = 60.0) -> int:
        """Its exit code, once it has ended."""
        return self.process.wait(timeout=timeout_s)


class ReplicatedMesh:
    """Starts with `start`; `with` ends every process."""

    def __init__(self, directory: Path, *, valkey_password: str | None = None) -> None:
        self.directory = directory
        # How the services are trusted, for settings that have them talk TLS.
        self.credentials: grpc.ChannelCredentials | None = None
        directory.mkdir(parents=True, exist_ok=True)
        services = [*PEERS, "gateway"]
        ports = free_ports(2 * len(services) + 1)
        self.ports = dict(zip(services, ports, strict=False))
        self.metrics_ports = dict(zip(services, ports[len(services) :], strict=False))
        self.settings: dict[str, Any] = {
            "models": {"paced": {"source": MODEL}},
            "valkey": {"url": f"redis://127.0.0.1:{ports[-1]}/0"},
            "gateway": {"http_listen": None},
        }
        for name in services:
            section = self.settings.setdefault(name, {})
            section["target"] = f"{name}.test:{self.ports[name]}"
            section["drain_timeout_s"] = 20
        self.environment = {
            **os.environ,
            "NAMES_FILE": str(directory / "names.json"),
            paced_core.STEP_MS_VARIABLE: str(STEP_MS),
            paced_core.MODEL_VARIABLE: MODEL,
        }
        self.replicas: dict[str, list[Replica]] = {name: [] for name in services}
        self._hosts = {name: iter(range(2, 250)) for name in services}
        self._started: list[Replica] = []
        self.valkey = EmbeddedValkey(
            directory, port=ports[-1], max_memory_bytes=2**26, password=valkey_password
        )
        self._valkey_process: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> ReplicatedMesh:
        with (self.directory / "valkey.log").open("ab") as log:
            self._valkey_process = subprocess.Popen(self.valkey.command(), stdout=log, stderr=log)
        return self

    def __exit__(self, *_: object) -> None:
        for replica in self._started:
            if replica.process.poll() is None:
                replica.process.kill()
        for replica in self._started:
            replica.process.wait()
        if self._valkey_process is not None:
            self._valkey_process.kill()
            self._valkey_process.wait()

    def channel(self, replica: Replica) -> grpc.Channel:
        """A channel to one replica, whose certificate carries the name of its service."""
        if self.credentials is None:
            return grpc.insecure_channel(replica.address)
        name = ("grpc.ssl_target_name_override", f"{replica.service}.test")
        return grpc.secure_channel(replica.address, self.credentials, [name])

    @property
    def target(self) -> str:
        """Of all gateways."""
        return "ipv4:" + ",".join(replica.address for replica in self.replicas["gateway"])

    def start(self, **counts: int) -> None:
        """So many replicas of each service, one where nothing is said."""
        started = [
            self.begin(service) for service in MODULES for _ in range(counts.get(service, 1))
        ]
        self.publish()
        for replica in started:
            replica.wait_until_healthy()

    def begin(self, service: str, host: str | None = None) -> Replica:
        """Starts one replica more, which no name has yet. Default: at an address of its own."""
        replica = Replica(self, service, host or f"127.0.0.{next(self._hosts[service])}")
        self.replicas[service].append(replica)
        self._started.append(replica)
        return replica

    def add(self, service: str) -> Replica:
        """One replica more, once it is healthy. Its name has it at once, as in Compose."""
        replica = self.begin(service)
        self.publish()
        replica.wait_until_healthy()
        return replica

    def forget(self, replica: Replica) -> None:
        """Takes its address from its name."""
        self.replicas[replica.service].remove(replica)
        self.publish()

    def publish(self) -> None:
        """Gives the names the addresses of the replicas."""
        names = {
            f"{service}.test": [replica.host for replica in replicas]
            for service, replicas in self.replicas.items()
        }
        path = self.directory / "names.json"
        (self.directory / "names.new").write_text(json.dumps(names))
        (self.directory / "names.new").replace(path)
