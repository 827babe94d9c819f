"""A Llama in the core process: 32 streams that come and go get what transformers gives alone."""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import torch
from transformers import LlamaForCausalLM

from services.engine.core.messages import Sampling, SequenceRequest, Stopping
from services.engine.core.settings import CoreSettings
from services.engine.core_client import CoreClient
from tests.fakes.small_llama import VOCAB_SIZE

KV_BYTES_PER_TOKEN = 2 * 2 * 2 * 16 * 4  # keys and values, layers, KV heads, head dim, float32


@pytest.fixture
async def client(checkpoint: Path) -> AsyncIterator[CoreClient]:
    """A core whose cache holds about two of the longest sequences below at full length."""
    settings = CoreSettings(
        model_path=str(checkpoint),
        device="cpu",
        dtype="float32",
        threads=1,
        kv_cache_memory_bytes=256 * KV_BYTES_PER_TOKEN,
        max_batch_tokens=48,
        max_running_sequences=16,
    )
    client = CoreClient(settings)
    await client.start()
    yield client
    await client.close()


def expected_outputs(checkpoint: Path, jobs: list[tuple[list[int], int]]) -> list[list[int]]:
    model = LlamaForCausalLM.from_pretrained(checkpoint, dtype=torch.float32).eval()
    outputs = []
    for prompt, max_tokens in jobs:
        ids = model.generate(
            torch.tensor([prompt]),
            attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
            max_new_tokens=max_tokens,
            do_sample=False,
            eos_token_id=2,
            pad_token_id=0,
        )
        outputs.append(ids[0, len(prompt) :].tolist())
    return outputs


async def test_32_streams_that_come_and_go_equal_transformers(
    client: CoreClient, checkpoint: Path
) -> None:
    rng = random.Random(3)
    jobs = [
        ([rng.randrange(3, VOCAB_SIZE) for _ in range(rng.randrange(1, 60))], rng.randrange(20, 80))
        for _ in range(32)
    ]
    expected = expected_outputs(checkpoint, jobs)

    async def one(number: int) -> None:
        # Half of them come at once and fill the cache, the others join while those run.
        await asyncio.sleep(rng.random() * 0.1 if number % 2 else 0)
        prompt, max_tokens = jobs[number]
        sequence = SequenceRequest(
            client.next_sequence_id(),
            prompt,
            Sampling(temperature=0),
            Stopping(max_tokens=max_tokens),
        )
        tokens: list[int] = []
        with client.submit([sequence]) as stream:
            while deltas := await stream.read():
                tokens += [token for delta in deltas for token in delta.token_ids]
                if number % 4 == 0 and len(tokens) > max_tokens // 2:
                    break
        assert tokens == expected[number][: len(tokens)]
        if number % 4:
            assert tokens == expected[number]

    await asyncio.gather(*(one(number) for number in range(32)))
    async with asyncio.timeout(10):
        while client.load.used_blocks or client.load.running_sequences:
            await asyncio.sleep(0.01)
    assert client.load.preemptions > 0
    assert client.load.failed_sequences == 0


async def test_a_seeded_sequence_is_the_same_alone_and_in_a_crowd(client: CoreClient) -> None:
    async def one(seed: int) -> list[int]:
        sequence = SequenceRequest(
            client.next_sequence_id(),
            [5, 6, 7],
            Sampling(temperature=0.9, top_p=0.95, seed=seed),
            Stopping(max_tokens=24, ignore_eos=True),
        )
        tokens: list[int] = []
        with client.submit([sequence]) as stream:
            while deltas := await stream.read():
                tokens += [token for delta in deltas for token in delta.token_ids]
        return tokens

    alone = await one(1)
    together = await asyncio.gather(*(one(seed) for seed in range(12)))
    assert together[1] == alone
    assert len({tuple(tokens) for tokens in together}) == 12
