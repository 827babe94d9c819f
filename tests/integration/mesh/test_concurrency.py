"""Many streams at once: everyone gets the answer they would have got alone."""

from __future__ import annotations

import asyncio
import random
import time

import meshserve
from tests.support.mesh import Mesh

STREAMS = 32
TOPICS = ("rivers", "bread", "the moon", "chess", "glass", "bees", "maps", "rust")


def prompts() -> list[str]:
    return [
        f"Write {3 + i % 5} words about {TOPICS[i % len(TOPICS)]} ({i})." for i in range(STREAMS)
    ]


def options(index: int) -> dict[str, object]:
    """Every other stream is greedy, the rest sample with a seed of their own."""
    if index % 2:
        return {"temperature": 0.9, "seed": index, "max_tokens": 12 + index % 9, "cache": False}
    return {"temperature": 0.0, "max_tokens": 12 + index % 9, "cache": False}


async def test_concurrent_streams_with_joins_and_cancellations_equal_those_alone(
    mesh: Mesh,
) -> None:
    dice = random.Random(11)
    async with mesh.async_client(timeout=240) as client:
        alone = [
            (await client.chat(prompt, **options(index))).text  # type: ignore[arg-type]
            for index, prompt in enumerate(prompts())
        ]

        async def one(index: int, cancel_after: int | None, delay_s: float) -> str | None:
            await asyncio.sleep(delay_s)
            pieces: list[str] = []
            async with client.stream_chat(prompts()[index], **options(index)) as stream:  # type: ignore[arg-type]
                async for chunk in stream:
                    pieces.append(chunk.text)
                    if cancel_after is not None and len(pieces) >= cancel_after:
                        return None
            return "".join(pieces)

        tasks = [
            one(
                index,
                dice.randrange(1, 6) if dice.random() < 0.3 else None,
                dice.uniform(0, 2.0),
            )
            for index in range(STREAMS)
        ]
        together = await asyncio.gather(*tasks)
    finished = [index for index, text in enumerate(together) if text is not None]
    assert len(finished) < STREAMS, "some streams were to be cancelled"
    assert {index: together[index] for index in finished} == {
        index: alone[index] for index in finished
    }
    assert_pool_returns_to_empty(mesh)


def assert_pool_returns_to_empty(mesh: Mesh, timeout_s: float = 10.0) -> None:
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline:
        used = mesh.metric("engine", "meshserve_engine_kv_blocks_used")
        running = mesh.metric("engine", "meshserve_engine_running_sequences")
        active = mesh.metric("gateway", "meshserve_gateway_active_requests")
        if not (used or running or active):
            return
        time.sleep(0.2)
    raise AssertionError(f"{used} blocks, {running} sequences, {active} requests are still held")


def test_a_client_that_goes_away_in_the_middle_frees_its_blocks(mesh: Mesh) -> None:
    with mesh.client() as client:
        stream = client.stream_chat("Tell me a long story.", max_tokens=1000, temperature=0)
        with stream:
            next(iter(stream))
            assert mesh.metric("engine", "meshserve_engine_kv_blocks") > 0
        assert_pool_returns_to_empty(mesh)
        assert isinstance(client.chat("Hello", max_tokens=2), meshserve.ChatCompletion)
