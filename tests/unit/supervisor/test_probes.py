"""Probes tell healthy from unhealthy from silent, against real servers."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import grpc
import pytest
from grpc_health.v1 import health, health_pb2, health_pb2_grpc

from meshserve.supervisor.probes import GrpcProbe, ValkeyProbe
from meshserve.supervisor.spec import ProbeError
from meshserve.transport import TLS
from tests.support.pki import Authority
from tests.support.ports import free_ports

Status = health_pb2.HealthCheckResponse


@pytest.fixture
async def health_server() -> AsyncIterator[tuple[health.aio.HealthServicer, str]]:
    server = grpc.aio.server()
    servicer = health.aio.HealthServicer()
    health_pb2_grpc.add_HealthServicer_to_server(servicer, server)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    yield servicer, f"127.0.0.1:{port}"
    await server.stop(0)


async def test_a_serving_service_is_healthy_and_one_that_is_not_says_so(
    health_server: tuple[health.aio.HealthServicer, str],
) -> None:
    servicer, target = health_server
    probe = GrpcProbe(target)
    await servicer.set("", Status.SERVING)
    await probe()
    await servicer.set("", Status.NOT_SERVING)
    with pytest.raises(ProbeError, match="is not serving") as caught:
        await probe()
    assert caught.value.answered
    await probe.close()


async def test_where_nobody_listens_nothing_answers() -> None:
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        port = closed.getsockname()[1]
    for probe in (GrpcProbe(f"127.0.0.1:{port}"), ValkeyProbe("127.0.0.1", port)):
        with pytest.raises(ProbeError, match="unreachable") as caught:
            await probe()
        assert not caught.value.answered


async def test_a_service_that_takes_calls_and_is_silent_does_not_answer(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("meshserve.supervisor.probes.PROBE_TIMEOUT_S", 0.2)
    release = asyncio.Event()

    async def hold(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await release.wait()
        writer.close()

    server = await asyncio.start_server(hold, "127.0.0.1", 0)
    port = server.sockets[0].getsockname()[1]
    for probe in (GrpcProbe(f"127.0.0.1:{port}"), ValkeyProbe("127.0.0.1", port)):
        with pytest.raises(ProbeError, match=r"is (silent|unreachable)") as caught:
            await probe()
        assert not caught.value.answered
    release.set()
    server.close()


@pytest.mark.parametrize(
    ("answer", "says"),
    [(b"+PONG\r\n", None), (b"-LOADING the dataset\r\n", "LOADING"), (b"", "''")],
)
async def test_valkey_is_healthy_once_it_answers_ping(answer: bytes, says: str | None) -> None:
    async def reply(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        assert await reader.readline() == b"PING\r\n"
        writer.write(answer)
        writer.close()

    server = await asyncio.start_server(reply, "127.0.0.1", 0)
    probe: Callable = ValkeyProbe("127.0.0.1", server.sockets[0].getsockname()[1])
    if says is None:
        await probe()
    else:
        with pytest.raises(ProbeError, match=says) as caught:
            await probe()
        assert caught.value.answered
    server.close()


async def test_a_service_that_comes_back_with_a_renewed_certificate_is_trusted(
    tmp_path: Path,
) -> None:
    (port,) = free_ports(1)
    probe = GrpcProbe(f"127.0.0.1:{port}", TLS(ca_file=tmp_path / "tls.crt"))
    for name in ("old", "new"):
        Authority(tmp_path / name, name).issue(tmp_path, "IP:127.0.0.1")
        pair = ((tmp_path / "tls.key").read_bytes(), (tmp_path / "tls.crt").read_bytes())
        server = grpc.aio.server(options=[("grpc.so_reuseport", 0)])
        servicer = health.aio.HealthServicer()
        await servicer.set("", Status.SERVING)
        health_pb2_grpc.add_HealthServicer_to_server(servicer, server)
        server.add_secure_port(f"127.0.0.1:{port}", grpc.ssl_server_credentials([pair]))
        await server.start()
        async with asyncio.timeout(10):
            while True:
                try:
                    await probe()
                    break
                except ProbeError:
                    await asyncio.sleep(0.02)
        await server.stop(0)
    await probe.close()
