"""A whole stack of Compose in a project of its own."""

from __future__ import annotations

import json
import socket
import subprocess
import urllib.parse
import urllib.request
import uuid
from pathlib import Path
from typing import Any

import meshserve
from tests.compose.images import TAG
from tests.compose.program import newest_compose
from tests.support.ports import free_ports
from tests.support.waiting import wait_until

DEPLOY = Path(__file__).parents[2] / "deploy"
OVERLAY = Path(__file__).parent / "compose.test.yaml"
SERVICES = ("gateway", "tokenizer", "engine", "cache", "safety")
# Everything but what cannot be stood in for.
STARTED = (*SERVICES, "valkey", "collector", "prometheus")
GATEWAY_PORTS = 3


class Stack:
    """`up` starts it and `down` removes it with its volumes and networks."""

    def __init__(
        self,
        environment: dict[str, str],
        overlays: tuple[str, ...] = (),
        program: list[str] | None = None,
    ) -> None:
        self._program = program or newest_compose()
        self.project = f"meshserve-test-{uuid.uuid4().hex[:8]}"
        self._gateway_port = _free_range(GATEWAY_PORTS)
        self._http_port = _free_range(GATEWAY_PORTS)
        self._receiver_port, self._prometheus_port = free_ports(2)
        files = [DEPLOY / name for name in ("compose.yaml", *overlays)]
        self.environment = {
            **environment,
            "COMPOSE_PROJECT_NAME": self.project,
            "COMPOSE_FILE": ":".join(map(str, [*files, OVERLAY])),
            "COMPOSE": " ".join(self._program),
            "IMAGE_TAG": TAG,
            "GATEWAY_PORT": f"{self._gateway_port}-{self._gateway_port + GATEWAY_PORTS - 1}",
            "GATEWAY_HTTP_PORT": f"{self._http_port}-{self._http_port + GATEWAY_PORTS - 1}",
            "RECEIVER_PORT": str(self._receiver_port),
            "PROMETHEUS_PORT": str(self._prometheus_port),
        }

    @property
    def target(self) -> str:
        """All ports that gateways are published on."""
        ports = range(self._gateway_port, self._gateway_port + GATEWAY_PORTS)
        return "ipv4:" + ",".join(f"127.0.0.1:{port}" for port in ports)

    def client(self, **options: Any) -> meshserve.Client:
        return meshserve.Client(self.target, **options)

    def up(self, **replicas: int) -> None:
        """Starts what is not running, with so many containers of each service."""
        scales = [f"--scale={service}={count}" for service, count in replicas.items()]
        self.compose("up", "--detach", "--no-build", *scales, *STARTED)

    def down(self) -> None:
        self.compose("down", "--volumes", "--remove-orphans", "--timeout", "10")

    def roll(self, service: str) -> None:
        """Replaces a service as the documentation says."""
        self._run([str(DEPLOY / "compose" / "roll.sh"), service])

    def compose(self, *arguments: str) -> str:
        return self._run([*self._program, *arguments])

    def docker(self, *arguments: str) -> str:
        return self._run(["docker", *arguments])

    def _run(self, command: list[str]) -> str:
        result = subprocess.run(
            command, env=self.environment, cwd=DEPLOY, capture_output=True, text=True, timeout=600
        )
        said = result.stdout[-3000:] + result.stderr[-3000:]
        assert result.returncode == 0, f"{' '.join(command)}: {said}"
        return result.stdout.strip()

    def containers(self, service: str) -> list[str]:
        """Ids of the running containers of a service."""
        labels = [
            f"label=com.docker.compose.project={self.project}",
            f"label=com.docker.compose.service={service}",
        ]
        filters = [part for label in labels for part in ("--filter", label)]
        return self.docker("ps", "--quiet", "--no-trunc", *filters).split()

    def inspect(self, container: str) -> dict[str, Any]:
        (description,) = json.loads(self.docker("inspect", container))
        return dict(description)

    def is_healthy(self, service: str) -> bool:
        """Whether all its containers say so of themselves when they are asked now."""
        containers = self.containers(service)
        return bool(containers) and all(self._probes(each, service) for each in containers)

    def _probes(self, container: str, service: str) -> bool:
        if service not in SERVICES:
            return bool(self.inspect(container)["State"]["Running"])
        result = subprocess.run(
            ["docker", "exec", container, "meshserve", "probe", service],
            env=self.environment,
            capture_output=True,
        )
        return result.returncode == 0

    def wait_until_healthy(self, timeout_s: float = 180.0) -> None:
        for service in (*SERVICES, "valkey"):
            wait_until(lambda name=service: self.is_healthy(name), f"{service} is well", timeout_s)

    def kill_process(self, container: str, word: str) -> None:
        """Kills the processes in a container that have a word on their command line as the kernel
        would: Docker takes `docker kill` for somebody's wish and starts nothing again."""
        script = (
            "import os, pathlib\n"
            "for path in pathlib.Path('/proc').glob('[0-9]*/cmdline'):\n"
            "    words = path.read_bytes().decode().split(chr(0))\n"
            f"    if int(path.parent.name) not in (1, os.getpid()) and {word!r} in words:\n"
            "        os.kill(int(path.parent.name), 9)\n"
        )
        # Detached: it ends with the container.
        self.docker("exec", "--detach", container, "python3", "-c", script)

    def restarts(self, container: str) -> int:
        """How often the engine has started it again."""
        return int(self.inspect(container)["RestartCount"])

    def page(self, path: str) -> tuple[int, str]:
        """The status and the content type of a page of the gateway's HTTP port."""
        with urllib.request.urlopen(
            f"http://127.0.0.1:{self._first_published('gateway', 8080)}{path}", timeout=10
        ) as response:
            return response.status, response.headers.get_content_type()

    def _first_published(self, service: str, port: int) -> int:
        container = self.containers(service)[0]
        return int(self.docker("port", container, f"{port}/tcp").rpartition(":")[2])

    def trace(self, trace_id: str) -> list[dict[str, str]]:
        """The spans of a trace that the receiver was sent."""
        return list(_get_json(f"http://127.0.0.1:{self._receiver_port}/{trace_id}"))

    def query(self, expression: str) -> list[dict[str, Any]]:
        """What Prometheus answers: a list of `metric` and `value`."""
        url = f"http://127.0.0.1:{self._prometheus_port}/api/v1/query?"
        answer = _get_json(url + urllib.parse.urlencode({"query": expression}))
        return list(answer["data"]["result"])

    def alerts(self) -> list[dict[str, Any]]:
        """What Prometheus says of each alert: `name`, `state` and `health`."""
        answer = _get_json(f"http://127.0.0.1:{self._prometheus_port}/api/v1/rules?type=alert")
        return [rule for group in answer["data"]["groups"] for rule in group["rules"]]

    def logs(self) -> str:
        return self.compose("logs", "--tail=15", "--no-color", *SERVICES)


def _get_json(url: str) -> Any:
    with urllib.request.urlopen(url, timeout=10) as response:
        return json.loads(response.read())


def _free_range(count: int) -> int:
    """The first of so many free ports in a row."""
    while True:
        (first,) = free_ports(1)
        if all(_is_free(port) for port in range(first, first + count)):
            return first


def _is_free(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) != 0
