"""TLS: the server is checked, and so is the client where the server asks for it."""

from __future__ import annotations

import subprocess
from collections.abc import Callable, Iterator
from concurrent import futures
from dataclasses import dataclass
from pathlib import Path

import grpc
import pytest

import meshserve
from meshserve import TLS, AsyncClient, Client
from meshserve.v1 import gateway_pb2, gateway_pb2_grpc
from tests.fakes.scripted_gateway import ScriptedGateway


@dataclass(frozen=True)
class Pair:
    certificate: Path
    key: Path


@pytest.fixture(scope="module")
def make_pair(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Pair]:
    """Makes a self-signed certificate for a DNS name."""

    def make(name: str) -> Pair:
        directory = tmp_path_factory.mktemp(name)
        pair = Pair(directory / "certificate.pem", directory / "key.pem")
        command = (
            "openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes -days 2 "
            f"-subj /CN={name} -addext subjectAltName=DNS:{name} "
            f"-keyout {pair.key} -out {pair.certificate}"
        )
        subprocess.run(command.split(), check=True, capture_output=True)
        return pair

    return make


@pytest.fixture(scope="module")
def server_pair(make_pair: Callable[[str], Pair]) -> Pair:
    return make_pair("mesh.test")


@pytest.fixture(scope="module")
def client_pair(make_pair: Callable[[str], Pair]) -> Pair:
    return make_pair("client.test")


@pytest.fixture
def serve(gateway: ScriptedGateway, server_pair: Pair) -> Iterator[Callable[..., str]]:
    """Serves the scripted gateway over TLS."""
    gateway.answer("CountTokens", gateway_pb2.CountTokensResponse(tokens=3))
    servers = []

    def start(client_ca: Path | None = None) -> str:
        server = grpc.server(futures.ThreadPoolExecutor(2))
        gateway_pb2_grpc.add_InferenceServiceServicer_to_server(gateway, server)
        credentials = grpc.ssl_server_credentials(
            [(server_pair.key.read_bytes(), server_pair.certificate.read_bytes())],
            root_certificates=client_ca.read_bytes() if client_ca else None,
            require_client_auth=client_ca is not None,
        )
        port = server.add_secure_port("127.0.0.1:0", credentials)
        server.start()
        servers.append(server)
        return f"127.0.0.1:{port}"

    yield start
    for server in servers:
        server.stop(0)


async def test_a_server_that_its_ca_vouches_for_is_trusted(
    serve: Callable[..., str], server_pair: Pair
) -> None:
    target = serve()
    tls = TLS(ca_file=server_pair.certificate, server_name="mesh.test")
    with Client(target, tls=tls, timeout=10) as client:
        assert client.count_tokens("x").tokens == 3
    async with AsyncClient(target, tls=tls, timeout=10) as aclient:
        assert (await aclient.count_tokens("x")).tokens == 3


@pytest.mark.parametrize("server_name", ["other.test", None])
def test_a_server_with_another_name_is_not(
    serve: Callable[..., str], server_pair: Pair, server_name: str | None
) -> None:
    tls = TLS(ca_file=server_pair.certificate, server_name=server_name)
    with (
        Client(serve(), tls=tls, timeout=10) as client,
        pytest.raises(meshserve.ConnectError),
    ):
        client.count_tokens("x")


def test_a_server_that_only_vouches_for_itself_is_not_trusted(serve: Callable[..., str]) -> None:
    with (
        Client(serve(), tls=TLS(server_name="mesh.test"), timeout=10) as client,
        pytest.raises(meshserve.ConnectError),
    ):
        client.count_tokens("x")


def test_a_server_that_asks_for_a_certificate_gets_the_clients(
    serve: Callable[..., str], server_pair: Pair, client_pair: Pair
) -> None:
    target = serve(client_ca=client_pair.certificate)
    without = TLS(ca_file=server_pair.certificate, server_name="mesh.test")
    with Client(target, tls=without, timeout=10) as client, pytest.raises(meshserve.ConnectError):
        client.count_tokens("x")
    with_certificate = TLS(
        ca_file=server_pair.certificate,
        certificate_file=client_pair.certificate,
        private_key_file=client_pair.key,
        server_name="mesh.test",
    )
    with Client(target, tls=with_certificate, timeout=10) as client:
        assert client.count_tokens("x").tokens == 3


def test_half_a_pair_and_missing_files_are_named() -> None:
    with pytest.raises(meshserve.ConfigurationError, match="go together"):
        Client(tls=TLS(certificate_file="x.pem"))
    with pytest.raises(meshserve.ConfigurationError, match=r"/no/such\.pem: No such file"):
        Client(tls=TLS(ca_file="/no/such.pem"))
