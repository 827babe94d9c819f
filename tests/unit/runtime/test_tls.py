"""Certificates are renewed under servers and clients that go on."""

from __future__ import annotations

import asyncio
import logging
import shutil
import ssl
import time
from collections.abc import AsyncIterator, Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import grpc
import pytest
from google.protobuf.wrappers_pb2 import StringValue
from grpc_health.v1 import health_pb2_grpc

from services.runtime import file_watch
from services.runtime.file_watch import FilesRefusedError
from services.runtime.health import SERVING, HealthServicer
from services.runtime.settings import TlsSettings
from services.runtime.telemetry import Metrics
from services.runtime.tls import ClientCredentials, ServerCertificates
from services.runtime.tls.pem import expiry
from tests.fakes.shapes import SERVICE, Shapes, ShapesStub
from tests.support.pki import Authority
from tests.support.waiting import until

NAME = "IP:127.0.0.1"


@pytest.fixture(autouse=True)
def _looks_often(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(file_watch, "INTERVAL_S", 0.01)


@pytest.fixture(scope="module")
def old_ca(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    return Authority(tmp_path_factory.mktemp("old"), "old-ca")


@pytest.fixture(scope="module")
def new_ca(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    return Authority(tmp_path_factory.mktemp("new"), "new-ca")


class Files:
    """The folder of a service, as a Secret with tls.crt, tls.key and ca.crt is mounted."""

    def __init__(self, folder: Path, authority: Authority) -> None:
        self.folder = folder
        self.issue(authority)
        self.trust(authority)

    def issue(self, authority: Authority, days: int = 7) -> None:
        authority.issue(self.folder, NAME, days=days)

    def trust(self, *authorities: Authority) -> None:
        texts = [each.certificate.read_text() for each in authorities]
        (self.folder / "ca.crt").write_text("".join(texts))

    def settings(self, *, mutual: bool = False) -> TlsSettings:
        return TlsSettings(
            certificate=self.folder / "tls.crt",
            private_key=self.folder / "tls.key",
            ca=self.folder / "ca.crt",
            client_ca=self.folder / "ca.crt" if mutual else None,
        )


class Served:
    """A gRPC server and a TLS listener with the same certificates."""

    def __init__(self, settings: TlsSettings) -> None:
        self.metrics = Metrics("cache")
        self.certificates = ServerCertificates(settings, self.metrics)
        self.shapes = Shapes("one")

    async def __aenter__(self) -> Served:
        self._server = grpc.aio.server()
        self.shapes.add_to(self._server)
        health = HealthServicer()
        health.set([SERVICE], SERVING)
        health_pb2_grpc.add_HealthServicer_to_server(health, self._server)
        self.grpc_port = self._server.add_secure_port("127.0.0.1:0", self.certificates.for_grpc())
        await self._server.start()
        self._listener = await asyncio.get_running_loop().create_server(
            asyncio.Protocol, "127.0.0.1", 0, ssl=self.certificates.for_http()
        )
        self.http_port: int = self._listener.sockets[0].getsockname()[1]
        self.certificates.start()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.certificates.stop()
        self._listener.close()
        await self._server.stop(0)

    async def lets_in(self, authority: Authority, own: TlsSettings | None = None) -> list[bool]:
        """Whether gRPC and HTTP are served to somebody who trusts only this authority."""
        context = ssl.create_default_context(cafile=authority.certificate)
        # So that the server's answer to our certificate is part of the handshake.
        context.maximum_version = ssl.TLSVersion.TLSv1_2
        if own is not None:
            context.load_cert_chain(own.certificate, own.private_key)
        return [await _connects(port, context) for port in (self.grpc_port, self.http_port)]

    def metric(self, name: str) -> float | None:
        labels = {"what": "certificate"} if "files" in name else {}
        return self.metrics.registry.get_sample_value(name, labels)


async def _connects(port: int, context: ssl.SSLContext) -> bool:
    # gRPC's servers talk to none that speak no HTTP/2.
    context.set_alpn_protocols(["h2"])
    try:
        _, writer = await asyncio.open_connection("127.0.0.1", port, ssl=context)
    except OSError:
        return False
    writer.close()
    return True


async def let_in(served: Served, authority: Authority, own: TlsSettings | None = None) -> None:
    async with asyncio.timeout(10):
        while not all(await served.lets_in(authority, own)):
            await asyncio.sleep(0.02)


@pytest.fixture
def files(tmp_path: Path, old_ca: Authority) -> Files:
    return Files(tmp_path / "server", old_ca)


@pytest.fixture
async def served(files: Files) -> AsyncIterator[Served]:
    async with Served(files.settings()) as served:
        yield served


async def test_new_connections_get_the_renewed_certificate(
    served: Served, files: Files, old_ca: Authority, new_ca: Authority
) -> None:
    assert await served.lets_in(old_ca) == [True, True]
    assert await served.lets_in(new_ca) == [False, False]
    files.issue(new_ca)
    await let_in(served, new_ca)
    assert await served.lets_in(old_ca) == [False, False]


async def test_when_the_certificate_expires_is_a_metric(
    served: Served, files: Files, old_ca: Authority
) -> None:
    in_days = (served.metric("meshserve_certificate_expiry_seconds") or 0) - time.time()
    assert 6.9 < in_days / 86400 <= 7
    files.issue(old_ca, days=14)
    await until(
        lambda: (
            (served.metric("meshserve_certificate_expiry_seconds") or 0) > time.time() + 13 * 86400
        )
    )


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (lambda f, ca: (f.folder / "tls.key").write_text("half"), "tls.key: holds no private key"),
        (lambda f, ca: (f.folder / "tls.crt").write_text("half"), "tls.crt: holds no certificates"),
        (lambda f, ca: (f.folder / "tls.crt").unlink(), "tls.crt: cannot be read: No such file"),
        (lambda f, ca: f.issue(ca, days=-1), "tls.crt: has expired on "),
    ],
    ids=["half a key", "half a certificate", "no certificate", "an old one"],
)
async def test_what_cannot_be_served_changes_nothing_and_is_told_of_once(
    served: Served,
    files: Files,
    old_ca: Authority,
    new_ca: Authority,
    caplog: pytest.LogCaptureFixture,
    change: Callable[[Files, Authority], Any],
    problem: str,
) -> None:
    change(files, new_ca)
    await until(lambda: served.metric("meshserve_files_refused") == 1)
    await asyncio.sleep(0.05)
    assert await served.lets_in(old_ca) == [True, True]
    (warning,) = [each for each in caplog.records if each.levelno >= logging.WARNING]
    assert problem in warning.getMessage()
    files.issue(new_ca)
    await let_in(served, new_ca)
    assert served.metric("meshserve_files_refused") == 0


async def test_a_key_of_another_certificate_is_not_served(
    served: Served, files: Files, tmp_path: Path, old_ca: Authority, new_ca: Authority
) -> None:
    new_ca.issue(tmp_path / "next", NAME)
    shutil.copy(tmp_path / "next" / "tls.crt", files.folder)
    await until(lambda: served.metric("meshserve_files_refused") == 1)
    assert await served.lets_in(old_ca) == [True, True]
    shutil.copy(tmp_path / "next" / "tls.key", files.folder)
    await let_in(served, new_ca)


async def test_callers_of_an_authority_that_is_trusted_no_more_are_sent_away(
    files: Files, tmp_path: Path, old_ca: Authority, new_ca: Authority
) -> None:
    old_caller = Files(tmp_path / "old-caller", old_ca).settings()
    new_caller = Files(tmp_path / "new-caller", new_ca).settings()
    async with Served(files.settings(mutual=True)) as served:
        assert await served.lets_in(old_ca) == [False, False]
        assert await served.lets_in(old_ca, old_caller) == [True, True]
        assert await served.lets_in(old_ca, new_caller) == [False, False]
        files.trust(old_ca, new_ca)
        await let_in(served, old_ca, new_caller)
        assert await served.lets_in(old_ca, old_caller) == [True, True]
        files.trust(new_ca)
        async with asyncio.timeout(10):
            while any(await served.lets_in(old_ca, old_caller)):
                await asyncio.sleep(0.02)
        assert await served.lets_in(old_ca, new_caller) == [True, True]


def test_nothing_good_to_begin_with_is_an_error(files: Files) -> None:
    (files.folder / "ca.crt").write_text("nobody")
    with pytest.raises(FilesRefusedError, match=r"ca\.crt: holds no certificates"):
        ServerCertificates(files.settings(mutual=True), Metrics("cache"))


@pytest.mark.parametrize("days", [1, 40, 365 * 30])
def test_the_expiry_is_what_openssl_says(tmp_path: Path, old_ca: Authority, days: int) -> None:
    old_ca.issue(tmp_path, NAME, days=days)
    chain = (tmp_path / "tls.crt").read_bytes() + old_ca.certificate.read_bytes()
    told = ssl._ssl._test_decode_cert(str(tmp_path / "tls.crt"))["notAfter"]  # type: ignore[attr-defined]
    of_ca = ssl._ssl._test_decode_cert(str(old_ca.certificate))["notAfter"]  # type: ignore[attr-defined]
    soonest = min(ssl.cert_time_to_seconds(told), ssl.cert_time_to_seconds(of_ca))
    assert expiry(chain) == soonest, datetime.fromtimestamp(soonest, UTC)


class Client:
    """Calls a server, mutually authenticated, as a service calls another."""

    def __init__(self, loopback: Any, files: Files, own: Files, port: int) -> None:
        settings = files.settings(mutual=True)
        self.metrics = loopback.metrics
        self.credentials = ClientCredentials(
            "trust_shapes", settings, own.settings(), loopback.metrics
        )
        loopback.stack.push_async_callback(self.credentials.close)
        self.channel = loopback.channel_to(f"127.0.0.1:{port}", credentials=self.credentials)
        self._stub = ShapesStub(self.channel)

    async def ask(self, command: str) -> str:
        return str((await self._stub.unary(StringValue(value=command))).value)

    @property
    def connections(self) -> list[Any]:
        return list(self.channel.replicas)


async def test_a_client_connects_anew_when_its_files_have_changed_and_no_call_fails(
    loopback: Any, files: Files, tmp_path: Path, old_ca: Authority, new_ca: Authority
) -> None:
    own = Files(tmp_path / "client", old_ca)
    async with Served(files.settings(mutual=True)) as served:
        client = Client(loopback, files, own, served.grpc_port)
        assert await client.ask("name") == "one"
        (first,) = client.connections
        under_way = asyncio.create_task(client.ask("sleep 0.5"))
        await served.shapes.began.wait()
        files.trust(old_ca, new_ca)
        await until(lambda: first not in client.connections or first.is_leaving)
        assert await client.ask("name") == "one"
        assert await under_way == "0.5"
        await until(lambda: first not in client.connections)
        files.issue(new_ca)
        own.issue(new_ca)
        await let_in(served, new_ca, own.settings())
        files.trust(new_ca)
        await asyncio.sleep(0.2)
        assert await client.ask("name") == "one"
        await until(lambda: len(client.connections) == 1)


async def test_a_client_keeps_its_connection_while_the_new_trust_does_not_fit(
    loopback: Any, files: Files, tmp_path: Path, old_ca: Authority, new_ca: Authority
) -> None:
    own = Files(tmp_path / "client", old_ca)
    trusting = Files(tmp_path / "trusting", old_ca)
    async with Served(files.settings(mutual=True)) as served:
        client = Client(loopback, trusting, own, served.grpc_port)
        assert await client.ask("name") == "one"
        trusting.trust(new_ca)
        await until(lambda: len(client.connections) == 2)
        await asyncio.sleep(0.3)
        assert await client.ask("name") == "one"
        files.issue(new_ca)
        await until(lambda: len(client.connections) == 1)
        assert await client.ask("name") == "one"
