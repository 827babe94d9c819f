"""`meshserve probe`: what watches over a service learns whether it can do its work."""

from __future__ import annotations

import subprocess
from collections.abc import Callable, Iterator
from concurrent import futures
from pathlib import Path

import grpc
import pytest
import yaml
from grpc_health.v1 import health, health_pb2, health_pb2_grpc

from tests.support.ports import free_ports


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


def test_a_service_with_mutual_tls_is_asked_with_its_own_certificate(
    serve: Callable[..., int], tmp_path: Path, meshserve: Callable
) -> None:
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
    settings = {
        "safety": {"listen": f"127.0.0.1:{port}", "target": "dns:///safety:50055", "tls": tls}
    }
    config = tmp_path / "mesh.yaml"
    config.write_text(yaml.safe_dump(settings))
    assert meshserve("probe", "safety", "--config", str(config)).code == 0

    address = f"localhost:{port}"
    assert meshserve("probe", address, "--timeout", "1").code == 3
    trusting = ("--tls-ca", str(certificate))
    assert meshserve("probe", address, "--timeout", "1", *trusting).code == 3


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
