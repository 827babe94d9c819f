"""Greedy answers of the mesh equal those of `transformers`, alone and in company."""

from __future__ import annotations

import asyncio
import random
from pathlib import Path

import pytest

import meshserve
from tests.support.mesh import Mesh

pytestmark = pytest.mark.slow

NEW_TOKENS = 32
PROMPTS = (
    "The capital of France is",
    "def fibonacci(n):\n    ",
    "Once upon a time, in a village by the sea,",
    "Water boils at",
    "«Ça va?» — «Oui, très",
    "1, 1, 2, 3, 5, 8,",
)


@pytest.fixture(scope="module")
def reference(demo_model_path: Path) -> list[tuple[list[int], list[int]]]:
    """Prompt and greedy completion of each prompt, both as token ids."""
    import torch
    from transformers import AutoModelForCausalLM

    from services.tokenizer.model_tokenizer import load_model_tokenizer

    tokenizer = load_model_tokenizer(demo_model_path)
    model = AutoModelForCausalLM.from_pretrained(
        demo_model_path.parent, gguf_file=demo_model_path.name, dtype=torch.float32
    ).eval()
    cases = []
    for text in PROMPTS:
        prompt = list(tokenizer.encode(text).token_ids)
        with torch.inference_mode():
            output = model.generate(
                torch.tensor([prompt]),
                attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
                max_new_tokens=NEW_TOKENS,
                min_new_tokens=NEW_TOKENS,
                do_sample=False,
                eos_token_id=None,
            )
        cases.append((prompt, output[0, len(prompt) :].tolist()))
    return cases


async def greedy(client: meshserve.AsyncClient, prompt: list[int]) -> list[int]:
    answer = await client.generate(
        prompt,
        temperature=0,
        repetition_penalty=1.0,
        max_tokens=NEW_TOKENS,
        ignore_eos=True,
        return_token_ids=True,
        cache=False,
    )
    return list(answer.choices[0].token_ids)


async def test_alone(mesh: Mesh, reference: list[tuple[list[int], list[int]]]) -> None:
    async with mesh.async_client(timeout=120) as client:
        for prompt, expected in reference:
            assert await greedy(client, prompt) == expected


async def test_in_a_batch_with_others_that_come_and_go(
    mesh: Mesh, reference: list[tuple[list[int], list[int]]]
) -> None:
    dice = random.Random(5)

    async def passer_by(client: meshserve.AsyncClient, number: int) -> None:
        await asyncio.sleep(dice.uniform(0, 2))
        stream = client.stream_generate(
            f"{number} passers-by", temperature=1.0, max_tokens=40, cache=False
        )
        async with stream:
            for _ in range(dice.randrange(1, 12)):
                await anext(aiter(stream), None)

    async with mesh.async_client(timeout=120) as client, asyncio.TaskGroup() as group:
        for number in range(12):
            group.create_task(passer_by(client, number))
        answers = [
            group.create_task(greedy(client, prompt)) for prompt, _ in reference for _ in range(2)
        ]
    expected = [completion for _, completion in reference for _ in range(2)]
    assert [task.result() for task in answers] == expected
