"""A real Valkey server per test, and cache services that answer over real gRPC."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path

import grpc
import pytest

from meshserve.v1 import cache_pb2_grpc
from services.cache.service import CacheService
from services.runtime.server_calls import CallInterceptor
from services.runtime.settings import Settings, parse_settings
from services.runtime.telemetry import Metrics
from services.runtime.valkey import EmbeddedValkey, ValkeyClient, connect


class ValkeyProcess:
    """A server that can be started, killed and made to hang."""

    def __init__(self, server: EmbeddedValkey) -> None:
        self.server = server
        self.url = server.url
        self.pid = 0
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        log = self.server.data_dir / "valkey.log"
        with log.open("ab") as output:
            self._process = subprocess.Popen(self.server.command(), stdout=output, stderr=output)
        self.pid = self._process.pid
        give_up_at = time.monotonic() + 10
        while not self._accepts():
            assert self._process.poll() is None, log.read_text()
            assert time.monotonic() < give_up_at, "the server does not answer"
            time.sleep(0.005)

    def kill(self) -> None:
        assert self._process is not None
        self._process.kill()
        self._process.wait()

    def check_not_ended_by_itself(self) -> None:
        assert self._process is not None
        ended = self._process.poll() is not None and self._process.returncode != -signal.SIGKILL
        assert not ended, (self.server.data_dir / "valkey.log").read_text()

    def hang(self) -> None:
        os.kill(self.pid, signal.SIGSTOP)

    def resume(self) -> None:
        os.kill(self.pid, signal.SIGCONT)

    def _accepts(self) -> bool:
        family = socket.AF_UNIX if self.server.unix_socket else socket.AF_INET
        address = str(self.server.unix_socket or "") or ("127.0.0.1", self.server.port)
        with socket.socket(family) as connection:
            connection.settimeout(1)
            with contextlib.suppress(OSError):
                connection.connect(address)
                connection.sendall(b"PING\r\n")
                return connection.recv(64) != b""
        return False


@pytest.fixture
def short_path() -> Iterator[Path]:
    """A directory whose path is short enough for a unix socket in it."""
    path = Path(tempfile.mkdtemp(prefix="mesh-"))
    yield path
    shutil.rmtree(path)


@pytest.fixture
def valkey(short_path: Path) -> Iterator[ValkeyProcess]:
    process = ValkeyProcess(EmbeddedValkey(short_path, unix_socket=short_path / "valkey.sock"))
    process.start()
    yield process
    process.check_not_ended_by_itself()
    process.kill()


@pytest.fixture
async def client(valkey: ValkeyProcess) -> AsyncIterator[ValkeyClient]:
    """A client for looking behind the scenes."""
    async with connect(valkey.url) as client:
        yield client


MakeCache = Callable[..., "contextlib.AbstractAsyncContextManager[cache_pb2_grpc.CacheServiceStub]"]


@pytest.fixture
def make_cache(valkey: ValkeyProcess) -> MakeCache:
    """Makes replicas of the cache; keywords are settings of its section. Instead of a URL it takes
    the settings of the section `valkey`."""

    @contextlib.asynccontextmanager
    async def make(url: str | dict[str, str] = valkey.url, **section: object):
        document = {"cache": section, "valkey": {"url": url} if isinstance(url, str) else url}
        settings: Settings = parse_settings(document, {})
        metrics = Metrics("cache")
        service = CacheService(settings, metrics)
        server = grpc.aio.server(interceptors=[CallInterceptor(metrics)])
        service.register(server)
        port = server.add_insecure_port("127.0.0.1:0")
        await service.start()
        await server.start()
        async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
            yield cache_pb2_grpc.CacheServiceStub(channel)
        await service.drain()
        await server.stop(0)
        await service.stop()

    return make


@pytest.fixture
async def cache(make_cache: MakeCache) -> AsyncIterator[cache_pb2_grpc.CacheServiceStub]:
    async with make_cache() as stub:
        yield stub
