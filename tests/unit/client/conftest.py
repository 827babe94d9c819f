"""A scripted gateway and a client of it."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from meshserve import Client
from tests.fakes.scripted_gateway import ScriptedGateway


@pytest.fixture
def gateway() -> Iterator[ScriptedGateway]:
    server = ScriptedGateway()
    yield server
    server.stop()


@pytest.fixture
def client(gateway: ScriptedGateway, monkeypatch: pytest.MonkeyPatch) -> Iterator[Client]:
    monkeypatch.delenv("MESHSERVE_API_KEY", raising=False)
    with Client(gateway.target, timeout=10) as made:
        yield made
