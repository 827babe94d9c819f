"""A gateway with its HTTP listener, between scripted peers."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import aiohttp
import pytest

from tests.fakes.scripted_mesh import ScriptedMesh
from tests.support.ports import free_ports


@pytest.fixture
async def mesh(tmp_path: Path) -> AsyncIterator[ScriptedMesh]:
    (port,) = free_ports(1)
    async with ScriptedMesh(tmp_path, gateway={"http_listen": f"127.0.0.1:{port}"}) as started:
        yield started


@pytest.fixture
async def http(mesh: ScriptedMesh) -> AsyncIterator[aiohttp.ClientSession]:
    """Calls the gateway by paths."""
    async with aiohttp.ClientSession(base_url=mesh.http_url) as session:
        yield session
