"""The stack with deploy/compose.tls.yaml: TLS at the edge, mutual TLS between the services."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

import meshserve
from tests.compose.stack import DEPLOY, SERVICES, Stack

pytestmark = [pytest.mark.docker, pytest.mark.timeout(1200)]


@pytest.fixture(scope="module")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("certificates") / "tls"
    script = DEPLOY / "compose" / "certificates.sh"
    subprocess.run([script], env={"TLS_DIR": str(folder), "PATH": "/usr/bin:/bin"}, check=True)
    return folder


@pytest.fixture(scope="module")
def tls_stack(images: dict[str, str], certificates: Path) -> Iterator[Stack]:
    stack = Stack({**images, "TLS_DIR": str(certificates)}, ("compose.tls.yaml",))
    try:
        stack.up()
        # The probe asks each service with the certificate that it shows to others.
        stack.wait_until_healthy()
        yield stack
    finally:
        stack.down()


def test_callers_that_trust_the_authority_are_answered(
    tls_stack: Stack, certificates: Path
) -> None:
    # A list of addresses has no name that a certificate could carry.
    trust = meshserve.TLS(ca_file=certificates / "ca.crt", server_name="localhost")
    with tls_stack.client(tls=trust, timeout=60) as client:
        assert "Paris" in client.chat("What is the capital of France?", temperature=0).text


def test_callers_without_tls_are_not(tls_stack: Stack) -> None:
    with tls_stack.client(timeout=10) as client, pytest.raises(meshserve.MeshServeError):
        client.chat("Hello.", max_tokens=1)


@pytest.mark.parametrize("service", [name for name in SERVICES if name != "gateway"])
def test_a_service_takes_calls_of_those_with_a_certificate_alone(
    tls_stack: Stack, service: str
) -> None:
    (container,) = tls_stack.containers(service)
    port = {"tokenizer": 50052, "engine": 50053, "cache": 50054, "safety": 50055}[service]
    trusting = ["--timeout=2", "--tls-ca=/etc/meshserve/tls/ca.crt"]
    showing = [
        "--tls-certificate=/etc/meshserve/tls/tls.crt",
        "--tls-key=/etc/meshserve/tls/tls.key",
    ]
    probe = ["exec", container, "meshserve", "probe", f"{service}:{port}", *trusting]
    assert "is serving" in tls_stack.docker(*probe, *showing)
    with pytest.raises(AssertionError, match=r"cannot be asked|did not answer"):
        tls_stack.docker(*probe)
