"""`meshserve probe`: what watches over a service learns whether it can do its work."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent import futures
from pathlib import Path
from typing import Any

import grpc
import pytest
import yaml
from grpc_health.v1 import health, health_pb2, health_pb2_grpc

from services.runtime.health_check import PROBE_FILE_VARIABLE, Endpoint, announce, ask
from services.runtime.own_endpoint import own_endpoint
from services.runtime.settings import parse_settings
from tests.support.ports import free_ports

# Each of these takes longer to import than the question to ask.
HEAVY = {"grpc", "google.protobuf", "click", "rich", "pydantic", "yaml", "asyncio", "ssl", "json"}


@pytest.fixture
def servicer() -> health.HealthServicer:
    servicer = health.HealthServicer()
    servicer.set("", health_pb2.HealthCheckResponse.SERVING)
    return servicer


@pytest.fixture
def serve(servicer: health.HealthServicer) -> Iterator[Callable[..., int]]:
    """Serves health on a loopback port and returns the port."""
    servers = []

    def start(credentials: grpc.ServerCredentials | None = None) -> int:
        server = grpc.server(futures.ThreadPoolExecutor(2))
        servers.append(server)
        health_pb2_grpc.add_HealthServicer_to_server(servicer, server)
        port = (
            server.add_insecure_port("127.0.0.1:0")
            if credentials is None
            else server.add_secure_port("127.0.0.1:0", credentials)
        )
        server.start()
        return port

    yield start
    for server in servers:
        server.stop(0)


def test_a_service_that_serves_is_exit_code_0(
    serve: Callable[..., int], meshserve: Callable
) -> None:
    result = meshserve("probe", f"127.0.0.1:{serve()}")
    assert (result.code, result.err) == (0, "")
    assert "is serving" in result.out


def test_a_service_that_cannot_work_is_exit_code_3_and_one_line(
    serve: Callable[..., int], servicer: health.HealthServicer, meshserve: Callable
) -> None:
    servicer.set("", health_pb2.HealthCheckResponse.NOT_SERVING)
    result = meshserve("probe", f"127.0.0.1:{serve()}")
    assert result.code == 3
    assert result.err.strip().endswith("is not serving")


def test_a_service_that_cannot_work_may_still_be_alive(
    serve: Callable[..., int], servicer: health.HealthServicer, meshserve: Callable
) -> None:
    servicer.set("", health_pb2.HealthCheckResponse.NOT_SERVING)
    servicer.set("liveness", health_pb2.HealthCheckResponse.SERVING)
    assert meshserve("probe", "--liveness", f"127.0.0.1:{serve()}").code == 0


def test_nobody_there_is_exit_code_3_and_says_why(meshserve: Callable) -> None:
    result = meshserve("probe", f"127.0.0.1:{free_ports(1)[0]}")
    assert result.code == 3
    assert "Connection refused" in result.err
    assert len(result.err.strip().splitlines()) == 1


def test_a_service_by_its_name_is_found_where_its_settings_say(
    serve: Callable[..., int], tmp_path: Path, meshserve: Callable
) -> None:
    settings = {
        # Where others find it is not where it is asked: that could be another replica.
        "engine": {"listen": f"0.0.0.0:{serve()}", "target": "dns:///engine.invalid:50053"}
    }
    config = tmp_path / "mesh.yaml"
    config.write_text(yaml.safe_dump(settings))
    result = meshserve("probe", "engine", "--config", str(config))
    assert (result.code, result.out) == (0, "engine is serving\n")


@pytest.fixture
def mutual_tls(serve: Callable[..., int], tmp_path: Path) -> dict[str, Any]:
    """The settings of a safety filter that takes calls of those with its own certificate alone."""
    certificate, key = tmp_path / "tls.crt", tmp_path / "tls.key"
    command = (
        "openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes -days 2 "
        f"-subj /CN=safety -addext subjectAltName=DNS:safety -keyout {key} -out {certificate}"
    )
    subprocess.run(command.split(), check=True, capture_output=True)
    pair = (key.read_bytes(), certificate.read_bytes())
    port = serve(
        grpc.ssl_server_credentials(
            [pair], root_certificates=certificate.read_bytes(), require_client_auth=True
        )
    )
    tls = {
        "certificate": str(certificate),
        "private_key": str(key),
        "client_ca": str(certificate),
    }
    return {"listen": f"127.0.0.1:{port}", "target": "dns:///safety:50055", "tls": tls}


def test_a_service_with_mutual_tls_is_asked_with_its_own_certificate(
    mutual_tls: dict[str, Any], tmp_path: Path, meshserve: Callable
) -> None:
    config = tmp_path / "mesh.yaml"
    config.write_text(yaml.safe_dump({"safety": mutual_tls}))
    assert meshserve("probe", "safety", "--config", str(config)).code == 0

    address = mutual_tls["listen"].replace("127.0.0.1", "localhost")
    assert meshserve("probe", address, "--timeout", "1").code == 3
    trusting = ("--tls-ca", mutual_tls["tls"]["certificate"])
    refused = meshserve("probe", address, "--timeout", "1", *trusting)
    assert refused.code == 3
    assert "certificate is not valid for 'localhost'" in refused.err


def test_a_certificate_that_is_missing_is_named(
    mutual_tls: dict[str, Any], tmp_path: Path, meshserve: Callable
) -> None:
    Path(mutual_tls["tls"]["private_key"]).unlink()
    config = tmp_path / "mesh.yaml"
    config.write_text(yaml.safe_dump({"safety": mutual_tls}))
    result = meshserve("probe", "safety", "--config", str(config))
    assert result.code == 3
    assert "tls.key: No such file or directory" in result.err


def test_who_takes_the_call_and_says_nothing_is_exit_code_3_in_time(meshserve: Callable) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        started = time.monotonic()
        result = meshserve("probe", f"127.0.0.1:{silent.getsockname()[1]}", "--timeout", "0.3")
    assert result.code == 3
    assert "did not answer within 0.3 s" in result.err
    assert time.monotonic() - started < 2


@pytest.mark.parametrize(
    ("answer", "why"),
    [
        (b"HTTP/1.1 400 Bad Request\r\n\r\n", "it does not speak gRPC"),
        (b"", "the connection was closed"),
        # A response that ends with its headers: the status is an error.
        (b"\0\0\0\4\0\0\0\0\0\0\0\0\1\5\0\0\0\1", "the call was refused"),
    ],
)
def test_what_does_not_tell_of_its_health_is_exit_code_3(
    answer: bytes, why: str, meshserve: Callable
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server, futures.ThreadPoolExecutor() as pool:

        def serve_once() -> None:
            connection, _ = server.accept()
            with connection:
                connection.recv(65536)
                connection.sendall(answer)

        pool.submit(serve_once)
        result = meshserve("probe", f"127.0.0.1:{server.getsockname()[1]}")
    assert result.code == 3
    assert result.err.strip().endswith(f"cannot be asked: {why}")


def test_a_service_on_a_unix_socket_is_asked(
    servicer: health.HealthServicer, tmp_path: Path, meshserve: Callable
) -> None:
    server = grpc.server(futures.ThreadPoolExecutor(2))
    health_pb2_grpc.add_HealthServicer_to_server(servicer, server)
    server.add_insecure_port(f"unix:{tmp_path}/socket")
    server.start()
    assert meshserve("probe", f"unix:{tmp_path}/socket").code == 0
    server.stop(0)


def test_a_name_may_be_as_long_as_names_are(serve: Callable[..., int]) -> None:
    name = ".".join(["a" * 63] * 3) + ".example"
    assert ask(Endpoint(f"127.0.0.1:{serve()}", server_name=name)) == ""


class Announced:
    """A container in which a service has noted how it is asked, and nobody has its settings."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv(PROBE_FILE_VARIABLE, str(folder / "probe"))

    def note(self, service: str, **settings: Any) -> None:
        announce(service, own_endpoint(parse_settings({service: settings}, {}).server(service)))

    def run(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        """`meshserve ARGUMENTS` with what it has imported on the last line."""
        script = (
            "import atexit, sys\n"
            "atexit.register(lambda: print(*sys.modules))\n"
            "from meshserve.__main__ import main\n"
            "main()"
        )
        return subprocess.run(
            [sys.executable, "-c", script, *arguments],
            env={**os.environ, "MESHSERVE_CONFIG": "/nowhere"},
            capture_output=True,
            text=True,
        )


@pytest.fixture
def container(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Announced:
    return Announced(tmp_path, monkeypatch)


def test_a_service_that_has_noted_how_it_is_asked_is_asked_with_next_to_nothing_imported(
    serve: Callable[..., int], container: Announced
) -> None:
    container.note("engine", listen=f"0.0.0.0:{serve()}", target="dns:///engine.invalid:50053")
    result = container.run("probe", "engine")
    said, imported = result.stdout.splitlines()
    assert (result.returncode, said, result.stderr) == (0, "engine is serving", "")
    assert not HEAVY.intersection(imported.split())


def test_its_illness_is_told_in_the_same_words(
    serve: Callable[..., int], servicer: health.HealthServicer, container: Announced
) -> None:
    servicer.set("", health_pb2.HealthCheckResponse.NOT_SERVING)
    servicer.set("liveness", health_pb2.HealthCheckResponse.SERVING)
    container.note("engine", listen=f"127.0.0.1:{serve()}")
    ill = container.run("probe", "engine")
    assert (ill.returncode, ill.stderr) == (3, "error: engine is not serving\n")
    assert container.run("probe", "--liveness", "engine").returncode == 0


def test_what_it_needs_for_mutual_tls_is_noted_too(
    mutual_tls: dict[str, Any], container: Announced
) -> None:
    container.note("safety", **mutual_tls)
    assert container.run("probe", "safety").returncode == 0


def test_of_another_service_the_settings_are_read(
    serve: Callable[..., int], container: Announced
) -> None:
    container.note("engine", listen=f"127.0.0.1:{serve()}")
    for arguments in (["cache"], ["engine", "--config", "/nowhere"]):
        result = container.run("probe", *arguments)
        assert result.returncode == 78
        assert "/nowhere" in result.stderr


def test_settings_that_are_wrong_are_exit_code_78(tmp_path: Path, meshserve: Callable) -> None:
    config = tmp_path / "mesh.yaml"
    config.write_text("engin: {}\n")
    result = meshserve("probe", "engine", "--config", str(config))
    assert result.code == 78
    assert "did you mean 'engine'" in result.err


def test_what_is_neither_a_service_nor_an_address_is_a_usage_error(meshserve: Callable) -> None:
    result = meshserve("probe", "valkey")
    assert result.code == 2
    assert "gateway, tokenizer, engine, cache, safety" in result.err
