"""A pod of the chart as a process of this machine, as a kubelet runs it: what it runs, with its
address, its variables, its volumes, its probes and its signal at the end."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

from tests.support.kubelet import publish

MOUNTS = "/etc/meshserve/"
MODELS = "/models"


class Sources:
    """The ConfigMaps and Secrets that volumes are made of.

    Args:
        manifests: with the ConfigMaps.
        secrets: a folder for each Secret, with a file for each key.
    """

    def __init__(self, manifests: Iterable[dict[str, Any]], secrets: Path) -> None:
        self._maps: dict[str, Mapping[str, str]] = {
            each["metadata"]["name"]: each["data"]
            for each in manifests
            if each["kind"] == "ConfigMap"
        }
        self._secrets = secrets

    def files(self, volume: Mapping[str, Any]) -> dict[str, bytes] | None:
        """What a volume holds now; None for one that is made of neither."""
        if "configMap" in volume:
            data = self._maps[volume["configMap"]["name"]]
            return {name: text.encode() for name, text in data.items()}
        if "secret" in volume:
            folder = self._secrets / volume["secret"]["secretName"]
            return {each.name: each.read_bytes() for each in folder.iterdir()}
        return None


class Pod:
    """The container of a Deployment's pod, as a process.

    Args:
        name: of the pod.
        address: an IP of its own, on which it alone listens.
        folder: where its volumes and its log go.
        cache: the volume of models.
    """

    def __init__(
        self,
        name: str,
        template: dict[str, Any],
        address: str,
        sources: Sources,
        folder: Path,
        cache: str,
    ) -> None:
        (container,) = template["spec"]["containers"]
        self.name = name
        self.service = container["name"]
        self.labels = template["metadata"]["labels"]
        self.address = address
        (self._port,) = (
            each["containerPort"] for each in container["ports"] if each["name"] == "grpc"
        )
        self.grace_s = template["spec"]["terminationGracePeriodSeconds"]
        self.probes = {
            kind: container[kind] for kind in ("startupProbe", "readinessProbe", "livenessProbe")
        }
        self._root = folder / name
        self._volumes = {each["name"]: each for each in template["spec"]["volumes"]}
        self._mounts = container["volumeMounts"]
        self._sources = sources
        self.mount()
        variables = {each["name"]: each["value"] for each in container["env"]}
        # As the images have it: where the probe finds how the service is asked.
        self.environment = os.environ | {"MESHSERVE_PROBE_FILE": f"{self._root}/probe"}
        self.environment |= {
            name: cache if value == MODELS else self._here(value)
            for name, value in variables.items()
        }
        self.process = subprocess.Popen(
            [sys.executable, "-m", f"services.{self.service}"],
            env=self.environment,
            stderr=(folder / f"{name}.log").open("w"),
        )

    @property
    def serves_at(self) -> tuple[str, int]:
        """Where its gRPC port is."""
        return self.address, self._port

    def mount(self) -> None:
        """Has its volumes hold what their sources hold now, as far as a kubelet does that."""
        for mount in self._mounts:
            path = Path(self._here(mount["mountPath"]))
            files = self._sources.files(self._volumes[mount["name"]])
            if files is None or path.is_file():
                continue
            texts = {name: self._here(each.decode()).encode() for name, each in files.items()}
            if "subPath" not in mount:
                publish(path, texts)
            else:
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(texts[mount["subPath"]])

    def _here(self, text: str) -> str:
        """With the pod's own folder and address in place of those of any pod."""
        return text.replace("0.0.0.0:", f"{self.address}:").replace(MOUNTS, f"{self._root}/")

    def passes(self, kind: str) -> bool:
        """What the kubelet makes of a probe."""
        probe = self.probes[kind]
        if "exec" in probe:
            command, *arguments = probe["exec"]["command"]
            program = Path(sys.executable).parent / command
            ran = subprocess.run([program, *arguments], env=self.environment, capture_output=True)
            return ran.returncode == 0
        with grpc.insecure_channel(f"{self.address}:{probe['grpc']['port']}") as channel:
            stub: Any = health_pb2_grpc.HealthStub(channel)
            request = health_pb2.HealthCheckRequest(service=probe["grpc"]["service"])
            try:
                answer = stub.Check(request, timeout=1)
            except grpc.RpcError:
                return False
        return bool(answer.status == health_pb2.HealthCheckResponse.SERVING)

    def stop(self) -> dict[str, Any]:
        """SIGTERM, and how it went."""
        started = time.monotonic()
        self.process.send_signal(signal.SIGTERM)
        try:
            code: int | None = self.process.wait(self.grace_s)
        except subprocess.TimeoutExpired:
            code = None
            self.process.kill()
        return {"ended": self.name, "code": code, "seconds": time.monotonic() - started}
