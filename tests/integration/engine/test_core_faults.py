"""A core that hangs or dies in the middle of a step: noticed, replaced, and said to the callers."""

from __future__ import annotations

import asyncio
import itertools
import os
import signal
import time
from collections.abc import AsyncIterator

import pytest

from services.engine.core.messages import Sampling, SequenceRequest, Stopping
from services.engine.core.settings import CoreSettings
from services.engine.core_client import CoreClient
from services.engine.request_stream import CoreLostError, CoreUnavailableError, RequestStream
from tests.fakes.core import CONTEXT_TOKENS
from tests.fakes.engines import reference_output
from tests.fakes.faulty_core import (
    COMMAND,
    EXIT,
    HANG,
    HANG_HOLDING_THE_INTERPRETER,
    SEGFAULT,
)
from tests.fakes.hash_model import SLOW_TOKEN_ID

STALL_TIMEOUT_S = 0.6
RESTART_STALLED_AFTER_S = 2.0


@pytest.fixture
async def client() -> AsyncIterator[CoreClient]:
    """A started client over the faulty core, quick to notice and to act."""
    settings = CoreSettings(
        model_path="hash", max_batch_tokens=64, max_running_sequences=8, max_waiting_sequences=64
    )
    client = CoreClient(
        settings,
        stall_timeout_s=STALL_TIMEOUT_S,
        restart_stalled_after_s=RESTART_STALLED_AFTER_S,
        command=COMMAND,
    )
    await client.start()
    yield client
    await client.close()


def request(client: CoreClient, prompt: list[int], max_tokens: int = 8) -> SequenceRequest:
    return SequenceRequest(
        client.next_sequence_id(),
        prompt,
        Sampling(seed=1),
        Stopping(max_tokens=max_tokens, ignore_eos=True),
    )


async def tokens_of(stream: RequestStream) -> list[int]:
    tokens: list[int] = []
    while deltas := await stream.read():
        for delta in deltas:
            tokens += delta.token_ids
    return tokens


async def under_way(
    client: CoreClient, count: int = 3, max_tokens: int = 200
) -> list[RequestStream]:
    """Streams that have had their first token and go on for long."""
    streams = [
        client.submit([request(client, [SLOW_TOKEN_ID, number], max_tokens)])
        for number in range(count)
    ]
    for stream in streams:
        await stream.read()
    return streams


def is_healthy(client: CoreClient) -> bool:
    try:
        client.check_health()
    except CoreUnavailableError:
        return False
    return True


async def turns(client: CoreClient, *, healthy: bool, within_s: float) -> None:
    async with asyncio.timeout(within_s):
        while is_healthy(client) is not healthy:
            await asyncio.sleep(0.01)


async def is_itself_again(client: CoreClient) -> None:
    """Healthy, empty, and right."""
    await turns(client, healthy=True, within_s=60)
    assert client.load.running_sequences == client.load.used_blocks == 0
    sequence = request(client, [1, 2, 3])
    assert await tokens_of(client.submit([sequence])) == reference_output(sequence, CONTEXT_TOKENS)


@pytest.mark.parametrize("prompt", [HANG, HANG_HOLDING_THE_INTERPRETER])
async def test_a_native_call_that_never_returns(client: CoreClient, prompt: list[int]) -> None:
    streams = await under_way(client)
    hung = client.submit([request(client, prompt)])
    await turns(client, healthy=False, within_s=10)
    with pytest.raises(CoreUnavailableError, match="silent"):
        client.submit([request(client, [1])])
    for stream in [hung, *streams]:
        with pytest.raises(CoreLostError):
            await tokens_of(stream)
    await is_itself_again(client)


@pytest.mark.parametrize("prompt", [SEGFAULT, EXIT])
async def test_a_native_call_that_ends_the_process(client: CoreClient, prompt: list[int]) -> None:
    streams = await under_way(client)
    fatal = client.submit([request(client, prompt)])
    for stream in [fatal, *streams]:
        with pytest.raises(CoreLostError):
            await tokens_of(stream)
    assert not is_healthy(client)
    await is_itself_again(client)


async def test_a_core_that_is_stopped_in_the_middle_of_a_decode(client: CoreClient) -> None:
    streams = await under_way(client)
    stopped_pid = client.core_pid
    assert stopped_pid is not None
    os.kill(stopped_pid, signal.SIGSTOP)
    await turns(client, healthy=False, within_s=10)
    for stream in streams:
        with pytest.raises(CoreLostError):
            await tokens_of(stream)
    await is_itself_again(client)
    assert client.core_pid != stopped_pid


async def test_a_core_that_was_only_held_up_loses_nothing(client: CoreClient) -> None:
    sequence = request(client, [SLOW_TOKEN_ID, 4], 40)
    stream = client.submit([sequence])
    pid = client.core_pid
    assert pid is not None
    os.kill(pid, signal.SIGSTOP)
    await turns(client, healthy=False, within_s=10)
    os.kill(pid, signal.SIGCONT)
    await turns(client, healthy=True, within_s=10)
    assert await tokens_of(stream) == reference_output(sequence, CONTEXT_TOKENS)
    assert client.core_pid == pid


async def test_a_core_that_keeps_crashing_is_restarted_ever_more_slowly() -> None:
    ends: list[float] = []
    client = CoreClient(
        CoreSettings(model_path="hash"),
        command=COMMAND,
        on_restart=lambda: ends.append(time.monotonic()),
    )
    await client.start()
    pauses = []
    for _ in range(4):
        while client.core_pid is None:
            await asyncio.sleep(0.005)
        os.kill(client.core_pid, signal.SIGKILL)
        crashes = len(ends) + 1
        async with asyncio.timeout(30):
            while len(ends) < crashes or client.core_pid is None:
                await asyncio.sleep(0.005)
        pauses.append(time.monotonic() - ends[-1])
    await client.close()
    assert pauses[0] >= 0.2
    assert all(later > 1.5 * earlier for earlier, later in itertools.pairwise(pauses))
