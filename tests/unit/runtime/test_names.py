"""Targets, and the addresses of the names in them."""

from __future__ import annotations

import asyncio
import contextvars
import socket
from collections.abc import Mapping, Sequence
from typing import Any

import pytest

from services.runtime import names
from services.runtime.names import NameWatch, resolve
from services.runtime.settings.targets import Name, grpc_target, parse_target
from tests.support.waiting import until


@pytest.mark.parametrize(
    ("target", "addresses", "found_names"),
    [
        ("dns:///engine:50053", [], [Name("engine", 50053)]),
        ("engine:50053", [], [Name("engine", 50053)]),
        ("dns:engine.svc:1,other:2", [], [Name("engine.svc", 1), Name("other", 2)]),
        ("ipv4:10.0.0.3:1,10.0.0.4:2", ["10.0.0.3:1", "10.0.0.4:2"], []),
        ("ipv6:[fd00::3]:1", ["[fd00::3]:1"], []),
        ("dns:///[::1]:1", ["[::1]:1"], []),
        ("10.0.0.3:1, engine:1", ["10.0.0.3:1"], [Name("engine", 1)]),
        ("10.0.0.3:1,10.0.0.3:1", ["10.0.0.3:1"], []),
        ("unix:/run/a,b.sock", ["unix:/run/a,b.sock"], []),
        ("unix-abstract:mesh", ["unix-abstract:mesh"], []),
    ],
)
def test_a_target_is_addresses_and_names(
    target: str, addresses: list[str], found_names: list[Name]
) -> None:
    parsed = parse_target(target)
    assert (list(parsed.addresses), list(parsed.names)) == (addresses, found_names)


@pytest.mark.parametrize(
    "target", ["", "engine", "engine:", "engine:0x1", "fd00::3:1", "xds:///engine:1", "a:1,,b:1"]
)
def test_what_is_no_target_is_refused(target: str) -> None:
    with pytest.raises(ValueError, match=r"HOST:PORT"):
        parse_target(target)


@pytest.mark.parametrize(
    ("address", "target"),
    [
        ("10.0.0.3:1", "ipv4:10.0.0.3:1"),
        ("[fd00::3]:1", "ipv6:[fd00::3]:1"),
        ("unix:/run/a.sock", "unix:/run/a.sock"),
    ],
)
def test_an_address_is_a_target_of_grpc(address: str, target: str) -> None:
    assert grpc_target(address) == target


class Records:
    """Names whose addresses a test changes, and what a watch has told of them."""

    def __init__(self, **addresses: Sequence[str] | Exception) -> None:
        self.addresses: dict[str, Any] = addresses
        self.told: list[Mapping[str, str | None]] = []
        self.look_ups = 0

    async def resolve(self, host: str) -> Sequence[str]:
        self.look_ups += 1
        found = self.addresses[host]
        if isinstance(found, Exception):
            raise found
        return list(found)

    async def looked_up(self, times: int) -> None:
        goal = self.look_ups + times
        async with asyncio.timeout(30):
            while self.look_ups < goal:
                await asyncio.sleep(0.001)


@pytest.fixture
def watch(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setattr(names, "LOOK_UP_INTERVAL_S", 0.002)
    started: list[NameWatch] = []

    def start(target: str, records: Records) -> None:
        watch = NameWatch(parse_target(target), records.told.append, records.resolve)
        watch.start()
        started.append(watch)

    yield start
    for each in started:
        each.close()


async def test_changes_are_told_and_nothing_else(watch) -> None:
    records = Records(engine=["10.0.0.2", "10.0.0.3"])
    watch("engine:1,10.0.0.9:1", records)
    await records.looked_up(3)
    records.addresses["engine"] = ["10.0.0.3", "10.0.0.2"]
    await records.looked_up(3)
    records.addresses["engine"] = ["10.0.0.3", "fd00::4"]
    await records.looked_up(3)
    assert records.told == [
        {"10.0.0.9:1": None},
        {"10.0.0.9:1": None, "10.0.0.2:1": "engine:1", "10.0.0.3:1": "engine:1"},
        {"10.0.0.9:1": None, "10.0.0.3:1": "engine:1", "[fd00::4]:1": "engine:1"},
    ]


async def test_a_look_up_without_an_answer_changes_nothing(watch) -> None:
    records = Records(engine=["10.0.0.2"])
    watch("engine:1", records)
    await records.looked_up(2)
    records.addresses["engine"] = socket.gaierror(socket.EAI_AGAIN, "try again")
    await records.looked_up(3)
    assert records.told == [{"10.0.0.2:1": "engine:1"}]


async def test_a_name_without_addresses_has_none(watch) -> None:
    records = Records(engine=["10.0.0.2"])
    watch("engine:1", records)
    await records.looked_up(2)
    records.addresses["engine"] = []
    await records.looked_up(3)
    assert records.told[-1] == {}


async def test_that_nothing_is_found_at_first_is_told_too(watch) -> None:
    records = Records(engine=OSError("no server"))
    watch("engine:1", records)
    await records.looked_up(3)
    assert records.told == [{}]


async def test_addresses_are_not_looked_up(watch) -> None:
    records = Records()
    watch("10.0.0.2:1,[::1]:1", records)
    await asyncio.sleep(0.01)
    assert records.told == [{"10.0.0.2:1": None, "[::1]:1": None}]
    assert not records.look_ups


async def test_the_system_knows_localhost() -> None:
    assert "127.0.0.1" in await resolve("localhost")


@pytest.mark.parametrize("error", [socket.EAI_NONAME, socket.EAI_NODATA])
async def test_a_name_that_is_not_there_is_an_answer(
    error: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise socket.gaierror(error, "not there")

    monkeypatch.setattr(socket, "getaddrinfo", fail)
    assert await resolve("engine") == []


async def test_a_resolver_that_cannot_say_is_no_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> None:
        raise socket.gaierror(socket.EAI_AGAIN, "try again")

    monkeypatch.setattr(socket, "getaddrinfo", fail)
    with pytest.raises(OSError, match="try again"):
        await resolve("engine")


async def test_a_look_up_that_hangs_is_given_up(watch, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(names, "LOOK_UP_TIMEOUT_S", 0.02)

    class HangsOnce(Records):
        async def resolve(self, host: str) -> Sequence[str]:
            found = await super().resolve(host)
            if self.look_ups == 1:
                await asyncio.Event().wait()
            return found

    records = HangsOnce(engine=["10.0.0.2"])
    watch("engine:1", records)
    await until(lambda: records.told and records.told[-1] == {"10.0.0.2:1": "engine:1"})


async def test_look_ups_know_nothing_of_the_request_that_needed_the_first(watch) -> None:
    request: contextvars.ContextVar[str] = contextvars.ContextVar("request")
    seen: set[str] = set()

    class Curious(Records):
        async def resolve(self, host: str) -> Sequence[str]:
            seen.add(request.get("none"))
            return await super().resolve(host)

    request.set("one with a deadline and a span")
    records = Curious(engine=["10.0.0.2"])
    watch("engine:1", records)
    await records.looked_up(2)
    assert seen == {"none"}
