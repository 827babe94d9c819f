"""Models that are no Llama in the core's own process, from a directory and from GGUF: streams, long
prompts beside others, and the core's death."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
import torch

from services.engine.core.messages import Sampling, SequenceRequest, Stopping
from services.engine.core.settings import CoreSettings
from services.engine.core_client import CoreClient
from services.engine.request_stream import CoreLostError
from tests.fakes.decoder_families import save_model, served
from tests.fakes.decoder_files import save_gguf
from tests.fakes.native_steps import text
from tests.support.waiting import until

pytestmark = pytest.mark.slow

# What is served, and from what kind of file.
MODELS = {"gemma3": "directory", "qwen3-moe": "gguf"}
PROMPTS = [text(length, seed) for seed, length in enumerate((5, 120, 33, 90, 1))]
COMPLETION_TOKENS = 24


@pytest.fixture(scope="module", params=MODELS)
def model(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, Any]:
    """Where a model is, and the model."""
    path = tmp_path_factory.mktemp("model")
    reference = save_model(request.param, path, **served(request.param))
    if MODELS[request.param] == "gguf":
        save_gguf(path, request.param, path / "model.gguf")
        path = path / "model.gguf"
    return path, reference


@pytest.fixture
async def client(model: tuple[Path, Any]) -> AsyncIterator[CoreClient]:
    """A core whose steps take fewer tokens than a prompt has, and whose cache is short."""
    settings = CoreSettings(
        model_path=str(model[0]),
        device="cpu",
        dtype="float32",
        threads=1,
        kv_cache_memory_bytes=1 << 20,
        max_batch_tokens=32,
        max_running_sequences=16,
    )
    client = CoreClient(settings)
    await client.start()
    yield client
    await client.close()


def expected(reference: Any, prompt: list[int]) -> list[int]:
    """What transformers completes a prompt to."""
    ids = reference.generate(
        torch.tensor([prompt]),
        attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
        max_new_tokens=COMPLETION_TOKENS,
        do_sample=False,
        eos_token_id=None,
    )
    found: list[int] = ids[0, len(prompt) :].tolist()
    return found


async def complete(
    client: CoreClient, prompt: list[int], max_tokens: int = COMPLETION_TOKENS
) -> list[int]:
    """A greedy stream, read to its end."""
    sequence = SequenceRequest(
        client.next_sequence_id(),
        prompt,
        Sampling(temperature=0),
        Stopping(max_tokens=max_tokens, ignore_eos=True),
    )
    tokens: list[int] = []
    with client.submit([sequence]) as stream:
        while deltas := await stream.read():
            tokens += [token for delta in deltas for token in delta.token_ids]
    return tokens


async def test_streams_equal_transformers_before_and_after_the_core_dies(
    client: CoreClient, model: tuple[Path, Any]
) -> None:
    answers = [expected(model[1], prompt) for prompt in PROMPTS]
    assert await asyncio.gather(*(complete(client, prompt) for prompt in PROMPTS)) == answers
    await until(lambda: client.load.used_blocks == 0)

    dying = asyncio.create_task(complete(client, PROMPTS[0], 150))
    await until(lambda: client.load.running_sequences == 1)
    pid = client.core_pid
    assert pid is not None
    os.kill(pid, signal.SIGKILL)
    with pytest.raises(CoreLostError):
        await dying

    await until(lambda: client.core_pid not in (None, pid) and _is_healthy(client), 60)
    assert await asyncio.gather(*(complete(client, prompt) for prompt in PROMPTS)) == answers


def _is_healthy(client: CoreClient) -> bool:
    try:
        client.check_health()
    except Exception:
        return False
    return True
