"""A mesh that has had traffic of all kinds, and a real Prometheus that scrapes it."""

from __future__ import annotations

import contextlib
import hashlib
import threading
import time
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from http.client import HTTPResponse
from pathlib import Path
from typing import Any

import pytest
import yaml

import meshserve
from tests.support.mesh import Mesh
from tests.support.otlp import Receiver
from tests.support.prometheus import Prometheus

HARBOUR = "The harbour lay quiet under the morning fog. "
ACME, LIMITED = "acme-key", "limited-key"
SETTINGS: dict[str, Any] = {
    "models": {
        "smollm2-135m": {"price": {"prompt": 100.0, "cached_prompt": 10.0, "completion": 400.0}}
    },
    "gateway": {
        "currency": "EUR",
        "rate_limit": {"burst": 2},
        "auth": {
            "mode": "required",
            "keys": [
                {"name": "acme", "sha256": hashlib.sha256(ACME.encode()).hexdigest()},
                {
                    "name": "limited",
                    "sha256": hashlib.sha256(LIMITED.encode()).hexdigest(),
                    "requests_per_minute": 1,
                },
            ],
        },
    },
    # 45 blocks, so that a sequence has to give way to another.
    "engine": {"kv_cache_bytes": 32 * 2**20},
}


@dataclass(frozen=True)
class Watched:
    """What tests ask."""

    mesh: Mesh
    prometheus: Prometheus
    otlp: Receiver


@pytest.fixture(scope="session")
def watched(tmp_path_factory: pytest.TempPathFactory, demo_model_path: Path) -> Iterator[Watched]:
    """The mesh after its traffic, which it still has while tests ask."""
    otlp = Receiver()
    directory = tmp_path_factory.mktemp("watched")
    keys = directory / "keys.yaml"
    keys.write_text("[]")
    settings = {**SETTINGS, "telemetry": {"otlp_endpoint": otlp.endpoint}}
    settings["gateway"]["auth"]["keys_file"] = str(keys)
    with Mesh(directory / "mesh", settings) as mesh:
        targets = {name: f"127.0.0.1:{port}" for name, port in mesh.metrics_ports.items()}
        with Prometheus(directory / "prometheus", targets) as prometheus:
            with mesh.client(api_key=ACME) as client:
                _preemption(client)
            # What begins with its first event is seen to grow from the second scrape on.
            with _get(mesh, "/api/requests") as stream:
                for number in range(3):
                    _traffic(mesh)
                    _change(keys, number)
                    stream.readline()
                    time.sleep(1.5)
            yield Watched(mesh, prometheus, otlp)
    otlp.close()


def _traffic(mesh: Mesh) -> None:
    """Requests that end in all the ways that a healthy mesh knows."""
    with mesh.client(api_key=ACME) as client:
        _streams(client)
        for _ in range(2):
            client.chat("Say marmalade.", temperature=0, max_tokens=8)
        client.generate("one two three four " * 12, temperature=0, max_tokens=40, ignore_eos=True)
        client.generate("A number: ", regex="[0-9]{3}", max_tokens=8)
        client.chat("My card is 4111 1111 1111 1111, remember it.", max_tokens=4)
        with contextlib.suppress(meshserve.MeshServeError):
            client.generate("word " * 3000)
    for key in (LIMITED, "nobody's"):
        with mesh.client(api_key=key) as client:
            for _ in range(4):
                with contextlib.suppress(meshserve.MeshServeError):
                    client.generate("Hello", max_tokens=2)
    _get(mesh, "/api/models").close()


def _get(mesh: Mesh, path: str) -> HTTPResponse:
    """Begins to read what the gateway answers by HTTP."""
    request = urllib.request.Request(
        f"http://127.0.0.1:{mesh.http_port}{path}", headers={"authorization": f"Bearer {ACME}"}
    )
    response = urllib.request.urlopen(request, timeout=30)
    assert isinstance(response, HTTPResponse)
    return response


def _change(keys: Path, number: int) -> None:
    """Another key, which nobody has."""
    digest = hashlib.sha256(str(number).encode()).hexdigest()
    keys.write_text(yaml.safe_dump([{"name": "nobody", "sha256": digest}]))


def _streams(client: meshserve.Client) -> None:
    """Three streams side by side, with a beginning in common."""

    def read(number: int) -> None:
        prompt = f"{HARBOUR * 4}Story {number}:"
        with client.stream_generate(prompt, max_tokens=24, ignore_eos=True) as stream:
            stream.collect()

    with ThreadPoolExecutor(3) as pool:
        list(pool.map(read, range(3)))


def _preemption(client: meshserve.Client) -> None:
    """Streams that nearly fill the KV cache give way to a prompt of a higher priority."""
    begun = threading.Barrier(3)

    def read(number: int) -> None:
        prompt = f"Story {number}: {HARBOUR * 24}"
        with client.stream_generate(prompt, max_tokens=150, ignore_eos=True) as stream:
            next(iter(stream))
            begun.wait(60)
            stream.collect()

    with ThreadPoolExecutor(2) as pool:
        reading = [pool.submit(read, number) for number in range(2)]
        begun.wait(60)
        client.generate("A very long tale. " * 60, max_tokens=2, priority=1)
        for each in reading:
            each.result()
