"""A core client over the fake core, and a small real checkpoint."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from services.engine.core.settings import CoreSettings
from services.engine.core_client import CoreClient
from tests.fakes.core import COMMAND
from tests.fakes.small_llama import save_small_llama


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small random Llama in float32."""
    path = tmp_path_factory.mktemp("llama")
    save_small_llama(path)
    return path


@pytest.fixture
async def client() -> AsyncIterator[CoreClient]:
    """A started client; its core stalls after 0.5 s and is replaced after 1.5 s."""
    settings = CoreSettings(
        model_path="hash", max_batch_tokens=64, max_running_sequences=8, max_waiting_sequences=64
    )
    client = CoreClient(settings, stall_timeout_s=0.5, restart_stalled_after_s=1.5, command=COMMAND)
    await client.start()
    yield client
    await client.close()
