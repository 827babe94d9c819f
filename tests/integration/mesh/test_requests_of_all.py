"""The console's pages over two real gateways, and a third that is away."""

from __future__ import annotations

import json
import socket
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import pytest

import meshserve
from tests.integration.mesh.test_gateways import digest, gateway_settings
from tests.support.mesh import Mesh
from tests.support.ports import free_ports
from tests.support.process import ServiceProcess

KEYS = [
    {"name": "acme", "sha256": digest("key-acme"), "requests_per_minute": 6},
    {"name": "other", "sha256": digest("key-other")},
    {"name": "ops", "sha256": digest("key-ops"), "operator": True},
]


@dataclass
class Pair:
    """Two gateways with a common target, under which a third is said to be that is not."""

    addresses: tuple[str, str]
    http: tuple[str, str]
    away: str

    def watched(self, gateway: int, path: str, key: str) -> Iterator[list[dict[str, Any]]]:
        """What a page of one gateway is told of all of them, as it comes."""
        request = urllib.request.Request(
            f"http://{self.http[gateway]}/api/{path}", headers={"authorization": f"Bearer {key}"}
        )
        with urllib.request.urlopen(request, timeout=20) as response:
            for line in response:
                if line.startswith(b"data: "):
                    yield json.loads(line.removeprefix(b"data: "))["gateways"]

    def ask(self, gateway: int, key: str, request_id: str) -> None:
        with meshserve.Client(self.addresses[gateway], api_key=key) as client:
            client.generate("Hello", max_tokens=3, cache=False, request_id=request_id)


@pytest.fixture(scope="module")
def pair(mesh: Mesh, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pair]:
    folder = tmp_path_factory.mktemp("gateways")
    # Nobody listens there, and nobody else can be given it.
    taken = socket.socket()
    taken.bind(("127.0.0.1", 0))
    away = f"127.0.0.1:{taken.getsockname()[1]}"
    both = [gateway_settings(mesh) for _ in range(2)]
    addresses = [each["gateway"]["listen"] for each in both]
    http = [f"127.0.0.1:{port}" for port in free_ports(2)]
    for settings, listen in zip(both, http, strict=True):
        settings["gateway"] |= {
            "auth": {"mode": "required", "keys": KEYS},
            "target": f"dns:///{','.join((*addresses, away))}",
            "http_listen": listen,
        }
        settings["models"]["smollm2-135m"]["price"] = {"prompt": 100, "completion": 1000}

    @contextmanager
    def running(number: int) -> Iterator[None]:
        with ServiceProcess("gateway", folder / str(number), both[number]) as process:
            process.wait_until_healthy()
            yield

    with taken, running(0), running(1):
        yield Pair((addresses[0], addresses[1]), (http[0], http[1]), away)


def found(
    documents: Iterator[list[dict[str, Any]]], wanted: Callable[[dict[str, str]], bool]
) -> dict[str, str]:
    """The address of the gateway of each request, by its id, once they are as wanted."""
    seen: dict[str, str] = {}
    for gateways in documents:
        for gateway in gateways:
            for request in gateway.get("finished", ()):
                seen[request["request_id"]] = gateway["address"]
        if wanted(seen):
            return seen
    raise AssertionError(seen)


def test_a_page_shows_the_requests_of_all_gateways(pair: Pair) -> None:
    pair.ask(0, "key-acme", "first")
    pair.ask(1, "key-acme", "second")
    for gateway in (0, 1):
        assert found(
            pair.watched(gateway, "requests", "key-acme"),
            lambda seen: {"first", "second"} <= {*seen},
        ) == {"first": pair.addresses[0], "second": pair.addresses[1]}


def test_one_that_ends_at_another_gateway_is_told_of_while_one_looks(pair: Pair) -> None:
    documents = pair.watched(0, "requests", "key-ops")
    next(documents)
    pair.ask(1, "key-other", "while-looking")
    seen = found(documents, lambda seen: "while-looking" in seen)
    assert seen["while-looking"] == pair.addresses[1]


def test_a_tenant_sees_none_of_anothers_at_either_gateway(pair: Pair) -> None:
    pair.ask(0, "key-other", "others")
    pair.ask(1, "key-other", "others-too")
    pair.ask(1, "key-acme", "own")
    seen = found(pair.watched(0, "requests", "key-acme"), lambda seen: "own" in seen)
    assert not {"others", "others-too"} & {*seen}
    everything = found(
        pair.watched(0, "requests", "key-ops"), lambda seen: {"own", "others-too"} <= {*seen}
    )
    assert "others" in everything


def test_a_gateway_that_does_not_answer_is_named(pair: Pair) -> None:
    gateways = {each["address"]: each for each in next(pair.watched(0, "requests", "key-ops"))}
    assert set(gateways) == {*pair.addresses, pair.away}, "each once, and itself among them"
    assert gateways[pair.away]["problem"]
    assert not any(gateways[address].get("problem") for address in pair.addresses)


def test_use_and_limits_are_those_of_all_gateways(pair: Pair) -> None:
    def usage() -> list[dict[str, Any]]:
        gateways = next(pair.watched(0, "usage", "key-acme"))
        return [each for each in gateways if "problem" not in each]

    def total(gateways: list[dict[str, Any]], field: str) -> float:
        return sum(float(model[field]) for each in gateways for model in each["models"])

    pair.ask(0, "key-acme", "counted-0")
    before = usage()
    pair.ask(1, "key-acme", "counted-1")
    after = usage()
    assert {each["tenant"] for each in after} == {"acme"}
    assert total(after, "requests") == total(before, "requests") + 1
    assert total(after, "completion_tokens") == total(before, "completion_tokens") + 3
    spent = total(after, "cost") - total(before, "cost")
    prompt = total(after, "prompt_tokens") - total(before, "prompt_tokens")
    assert spent == pytest.approx((100 * prompt + 1000 * 3) / 1e6)
    limits = [each["allowance"] for each in after]
    assert {each["requests_per_minute"] for each in limits} == {6}
    assert limits[0]["remaining"] == limits[1]["remaining"] < limits[0]["burst"]
    assert limits[0]["full_after_ms"] > 0
    (free,) = [
        each
        for each in next(pair.watched(1, "usage", "key-other"))
        if each["address"] == pair.addresses[1]
    ]
    assert "allowance" not in free


def test_looking_at_a_limit_takes_nothing_of_it(pair: Pair) -> None:
    def remaining() -> int:
        return int(next(pair.watched(0, "usage", "key-acme"))[0]["allowance"]["remaining"])

    before = remaining()
    for _ in range(3):
        assert remaining() >= before
