"""The password of a real Valkey server changes while requests run, and none of them fails."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator
from pathlib import Path

import grpc
import pytest

from meshserve.v1 import cache_pb2, cache_pb2_grpc
from services.runtime import file_watch
from services.runtime.settings import ValkeySettings
from services.runtime.telemetry import Metrics
from services.runtime.valkey import (
    EmbeddedValkey,
    ValkeyClient,
    ValkeyUrlError,
    connect,
    connect_as_set,
)
from tests.integration.cache.conftest import MakeCache, ValkeyProcess

# How long a rotation takes that a caller must not notice.
SETTLED_S = 0.3


@pytest.fixture(autouse=True)
def _looks_often(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(file_watch, "INTERVAL_S", 0.05)


class Load:
    """Callers of a cache, each on a key of its own, until the end of the block."""

    def __init__(self, cache: cache_pb2_grpc.CacheServiceStub) -> None:
        self._cache = cache
        self._stop = asyncio.Event()
        self.answered = 0
        self.failures: list[grpc.aio.AioRpcError] = []

    async def call(self, number: int) -> None:
        while not self._stop.is_set():
            key = cache_pb2.CacheKey(model="m", request=b"%d" % number)
            try:
                await self._cache.LookUp(cache_pb2.LookUpRequest(key=key), timeout=10)
                self.answered += 1
            except grpc.aio.AioRpcError as error:
                self.failures.append(error)

    async def go_on(self) -> None:
        goal = self.answered + 100
        async with asyncio.timeout(10):
            while self.answered < goal:
                await asyncio.sleep(0.01)
        assert not self.failures


@contextlib.asynccontextmanager
async def load_on(cache: cache_pb2_grpc.CacheServiceStub) -> AsyncIterator[Load]:
    load = Load(cache)
    callers = [asyncio.create_task(load.call(number)) for number in range(8)]
    try:
        await load.go_on()
        yield load
        await load.go_on()
    finally:
        load._stop.set()
        await asyncio.gather(*callers)
    assert not load.failures


async def drop_connections(admin: ValkeyClient) -> None:
    """Has every client but this one connect anew, and so show its password."""
    await admin.execute("CLIENT", "KILL", "TYPE", "NORMAL", "SKIPME", "yes")


@pytest.fixture
def password_file(tmp_path: Path, valkey: ValkeyProcess) -> Path:
    path = tmp_path / "password"
    path.write_text("first\n")
    return path


@pytest.fixture
async def admin(valkey: ValkeyProcess) -> AsyncIterator[ValkeyClient]:
    """Connects as a user of its own, whose rights do not change."""
    async with connect(valkey.url) as first:
        await first.execute("ACL", "SETUSER", "admin", "on", ">root", "~*", "&*", "+@all")
        await first.execute("CONFIG", "SET", "requirepass", "first")
    async with connect(valkey.url.replace("unix://", "unix://admin:root@")) as admin:
        yield admin


def settings(valkey: ValkeyProcess, password_file: Path) -> dict[str, str]:
    return {"url": valkey.url, "password_file": str(password_file)}


async def test_a_password_that_is_in_the_file_first_fails_no_request(
    make_cache: MakeCache,
    valkey: ValkeyProcess,
    admin: ValkeyClient,
    password_file: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    async with make_cache(settings(valkey, password_file)) as cache, load_on(cache) as load:
        password_file.write_text("second\n")
        await asyncio.sleep(SETTLED_S)
        await drop_connections(admin)
        await load.go_on()
        await admin.execute("CONFIG", "SET", "requirepass", "second")
        await drop_connections(admin)
        await load.go_on()
    assert "first" not in caplog.text
    assert "second" not in caplog.text
    told = [each for each in caplog.records if each.levelno >= logging.WARNING]
    assert ["stays so" in each.getMessage() for each in told] == [True]


async def test_a_user_who_has_both_passwords_for_a_while_fails_no_request(
    make_cache: MakeCache, valkey: ValkeyProcess, admin: ValkeyClient, tmp_path: Path
) -> None:
    await admin.execute("ACL", "SETUSER", "mesh", "on", ">old", "~*", "&*", "+@all")
    url_file = tmp_path / "url"

    def url(password: str) -> str:
        return valkey.url.replace("unix://", f"unix://mesh:{password}@")

    url_file.write_text(url("old"))
    async with make_cache({"url_file": str(url_file)}) as cache, load_on(cache) as load:
        await admin.execute("ACL", "SETUSER", "mesh", ">new")
        url_file.write_text(url("new"))
        await asyncio.sleep(SETTLED_S)
        # Ends the connections that were made with it.
        await admin.execute("ACL", "SETUSER", "mesh", "<old")
        await drop_connections(admin)
        await load.go_on()


async def test_a_password_that_the_server_has_first_is_read_when_it_is_needed(
    valkey: ValkeyProcess, admin: ValkeyClient, password_file: Path
) -> None:
    section = ValkeySettings(url=valkey.url, password_file=password_file)
    async with connect_as_set(section, Metrics("cache")) as client:
        await client.ping()
        await admin.execute("CONFIG", "SET", "requirepass", "second")
        password_file.write_text("second")
        await drop_connections(admin)
        # Nothing watches the file here: `start` has not been called.
        await client.ping()


async def test_another_server_takes_over_once_it_answers(
    valkey: ValkeyProcess, short_path: Path, tmp_path: Path
) -> None:
    (short_path / "other").mkdir()
    other = ValkeyProcess(
        EmbeddedValkey(short_path / "other", unix_socket=short_path / "other.sock")
    )
    url_file = tmp_path / "url"
    url_file.write_text(valkey.url)
    async with connect_as_set(ValkeySettings(url_file=url_file), Metrics("cache")) as client:
        client.start()
        await client.execute("SET", "where", "here")
        url_file.write_text(other.url)
        await asyncio.sleep(SETTLED_S)
        assert await client.execute("GET", "where") == b"here"
        other.start()
        try:
            async with asyncio.timeout(5):
                while await client.execute("GET", "where") is not None:
                    await asyncio.sleep(0.02)
        finally:
            other.kill()


@pytest.mark.parametrize(
    ("url", "password", "problem"),
    [
        ("redis://valkey", b"", "expected one line"),
        ("redis://valkey", b"s3cret\nother", "expected one line"),
        ("redis://valkey", b"\xff", "is no text"),
        ("redis://:s3cret@valkey", b"s3cret", "has a password, and so has"),
        ("redis://[s3cret", b"s3cret", "cannot be read"),
        ("redis://valkey", None, "cannot be read: No such file"),
    ],
)
def test_what_cannot_be_used_at_the_start_says_why_and_repeats_no_secret(
    tmp_path: Path, url: str, password: bytes | None, problem: str
) -> None:
    path = tmp_path / "password"
    if password is not None:
        path.write_bytes(password)
    with pytest.raises(ValkeyUrlError) as caught:
        connect_as_set(ValkeySettings(url=url, password_file=path), Metrics("cache"))
    assert problem in str(caught.value)
    assert "s3cret" not in str(caught.value)
