"""A mesh that shows its traces in Phoenix, and a browser that looks at them."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from selenium import webdriver

from tests.support.browser import chromium
from tests.support.mesh import Mesh
from tests.support.phoenix import require_phoenix, wait_until_up
from tests.support.ports import free_ports


@pytest.fixture(scope="session")
def mesh(tmp_path_factory: pytest.TempPathFactory, demo_model_path: Path) -> Iterator[Mesh]:
    """`meshserve up --traces` with ports of its own."""
    port, otlp_port = free_ports(2)
    phoenix = {"command": str(require_phoenix()), "port": port, "otlp_port": otlp_port}
    started = Mesh(
        tmp_path_factory.mktemp("mesh"),
        {"telemetry": {"phoenix": phoenix}, "engine": {"max_running_sequences": 8}},
        flags=["--traces"],
    )
    with started:
        wait_until_up(f"http://127.0.0.1:{port}")
        yield started


@pytest.fixture(scope="session")
def phoenix(mesh: Mesh) -> str:
    """Where its pages are."""
    return f"http://127.0.0.1:{mesh.settings['telemetry']['phoenix']['port']}"


@pytest.fixture(scope="session")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[webdriver.Chrome]:
    with chromium(tmp_path_factory.mktemp("profile"), 1600, 1100) as driver:
        yield driver
