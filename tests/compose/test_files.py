"""The Compose files and the Dockerfile are what they should be, before anything is run."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from services.runtime.settings import load_settings
from tests.compose.program import COMPOSE_PROGRAMS, require_compose
from tests.compose.stack import DEPLOY, SERVICES

OVERLAYS = ("compose.gpu.yaml", "compose.tls.yaml", "compose.dev.yaml")
# What is published beside the gateway: pages for people.
USER_INTERFACES = {"jaeger", "prometheus", "grafana"}


def merged(program: list[str], *overlays: str) -> dict[str, Any]:
    """What Compose makes of the files. Fails where it refuses them."""
    files = [part for name in ("compose.yaml", *overlays) for part in ("-f", name)]
    result = subprocess.run(
        [*program, *files, "config"], cwd=DEPLOY, capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr
    return dict(yaml.safe_load(result.stdout))


@pytest.fixture(params=COMPOSE_PROGRAMS)
def program(request: pytest.FixtureRequest) -> list[str]:
    """Compose 1.29 and Compose 2."""
    return require_compose(request.param)


@pytest.mark.slow  # Compose takes a second each time; it needs no engine for that
@pytest.mark.parametrize("overlay", [None, *OVERLAYS])
def test_the_files_are_valid(program: list[str], overlay: str | None) -> None:
    services = merged(program, *filter(None, [overlay]))["services"]
    assert set(SERVICES) <= set(services)


@pytest.mark.slow  # Compose takes a second each time; it needs no engine for that
def test_a_card_is_reserved_by_the_gpu_overlay(program: list[str]) -> None:
    engine = merged(program, "compose.gpu.yaml")["services"]["engine"]
    (device,) = engine["deploy"]["resources"]["reservations"]["devices"]
    assert (device["driver"], device["capabilities"]) == ("nvidia", ["gpu"])
    assert engine["build"]["target"] == "engine-cuda"
    assert engine["environment"]["MESHSERVE_CONFIG"]


def test_only_the_gateway_and_pages_for_people_are_published() -> None:
    services = _services()
    published = {name for name, service in services.items() if "ports" in service}
    assert published == {"gateway", *USER_INTERFACES}
    for name in published:
        assert all(
            port.startswith("${BIND_ADDRESS:-127.0.0.1}:") for port in services[name]["ports"]
        )


def test_every_container_may_do_as_little_as_it_can() -> None:
    for name, service in _services().items():
        assert service["read_only"], name
        assert service["cap_drop"] == ["ALL"], name
        assert service["security_opt"] == ["no-new-privileges:true"], name
        assert "mem_limit" in service or name == "model", name


def test_services_are_given_longer_to_stop_than_they_take_to_drain() -> None:
    settings = load_settings(DEPLOY / "compose" / "meshserve.yaml", {})
    for name in SERVICES:
        grace_s = int(_services()[name]["stop_grace_period"].removesuffix("s"))
        assert grace_s > settings.server(name).drain_timeout_s + 5


def test_others_find_each_service_by_a_name_that_has_all_its_replicas() -> None:
    settings = load_settings(DEPLOY / "compose" / "meshserve.yaml", {})
    for name in set(SERVICES) - {"gateway"}:
        port = settings.server(name).listen.rpartition(":")[2]
        assert settings.server(name).target == f"dns:///{name}:{port}"


def test_the_folders_that_are_mounted_exist() -> None:
    for name, service in _services().items():
        for volume in service.get("volumes", []):
            source = volume.partition(":")[0]
            if source.startswith("./"):
                assert (DEPLOY / source).exists(), f"{name}: {source}"


def test_certificates_are_made_for_every_service_and_trusted(tmp_path: Path) -> None:
    folder = tmp_path / "tls"
    script = [str(DEPLOY / "compose" / "certificates.sh"), "llm.example.com"]
    for _ in range(2):  # the second run renews
        environment = {**os.environ, "TLS_DIR": str(folder)}
        subprocess.run(script, env=environment, check=True, capture_output=True)
    for name in SERVICES:
        own = folder / name
        verify = ["openssl", "verify", "-CAfile", str(own / "ca.crt"), str(own / "tls.crt")]
        subprocess.run(verify, check=True, capture_output=True)
        show = ["openssl", "x509", "-in", str(own / "tls.crt"), "-noout", "-text"]
        text = subprocess.run(show, check=True, capture_output=True, text=True).stdout
        assert f"DNS:{name}" in text
        assert ("llm.example.com" in text) == (name == "gateway")
    assert folder.stat().st_mode & 0o077 == 0, "the keys are open to others"


def _services() -> dict[str, Any]:
    return dict(yaml.safe_load((DEPLOY / "compose.yaml").read_text())["services"])
