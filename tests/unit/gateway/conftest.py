"""A gateway between scripted peers."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from tests.fakes.scripted_mesh import ScriptedMesh


@pytest.fixture
async def mesh(tmp_path: Path) -> AsyncIterator[ScriptedMesh]:
    async with ScriptedMesh(tmp_path) as started:
        yield started
