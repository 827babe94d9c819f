"""The core in its own process: streams, cancellations, faults, crashes, recoveries."""

from __future__ import annotations

import asyncio
import os
import random
import signal
import sys

import pytest

from services.engine.core.messages import (
    Add,
    Delta,
    Finish,
    FinishReason,
    Ready,
    Sampling,
    SequenceRequest,
    Stopping,
)
from services.engine.core.settings import CoreSettings
from services.engine.core_client import CoreClient, CoreStartError
from services.engine.core_process import CoreProcess
from services.engine.request_stream import (
    CoreLostError,
    CoreUnavailableError,
    RefusedError,
    RequestStream,
)
from tests.fakes.core import COMMAND, CONTEXT_TOKENS
from tests.fakes.engines import reference_output
from tests.fakes.hash_model import (
    NAN_TOKEN_ID,
    RAISING_TOKEN_ID,
    SLOW_TOKEN_ID,
    STALLING_TOKEN_ID,
)
from tests.support.waiting import until


def request(
    client: CoreClient,
    prompt: list[int],
    max_tokens: int = 8,
    *,
    seed: int = 0,
    temperature: float = 1.0,
) -> SequenceRequest:
    return SequenceRequest(
        client.next_sequence_id(),
        prompt,
        Sampling(temperature=temperature, seed=seed),
        Stopping(max_tokens=max_tokens, ignore_eos=True),
    )


async def read_to_end(stream: RequestStream) -> tuple[list[int], Finish]:
    tokens: list[int] = []
    finish = None
    while deltas := await stream.read():
        for delta in deltas:
            tokens += delta.token_ids
            finish = delta.finish or finish
    assert finish is not None
    return tokens, finish


def is_healthy(client: CoreClient) -> bool:
    try:
        client.check_health()
    except CoreUnavailableError:
        return False
    return True


async def generates(client: CoreClient) -> None:
    sequence = request(client, [1, 2, 3])
    tokens, finish = await read_to_end(client.submit([sequence]))
    assert tokens == reference_output(sequence, CONTEXT_TOKENS)
    assert finish.reason is FinishReason.LENGTH


async def test_a_sequence_streams_from_the_process(client: CoreClient) -> None:
    await generates(client)
    await until(lambda: client.load.used_blocks == 0)


async def test_the_first_token_comes_alone_and_later_ones_accrue(client: CoreClient) -> None:
    stream = client.submit([request(client, [SLOW_TOKEN_ID], 20)])
    first = await stream.read()
    assert [len(delta.token_ids) for delta in first] == [1]
    await asyncio.sleep(0.2)
    accrued: list[Delta] = await stream.read()
    assert len(accrued) > 3
    stream.close()


async def test_32_streams_with_joins_and_cancellations_equal_those_alone(
    client: CoreClient,
) -> None:
    rng = random.Random(7)

    async def one(number: int) -> bool:
        await asyncio.sleep(rng.random() * 0.5)
        prompt = [rng.randrange(50) for _ in range(rng.randrange(1, 60))]
        sequence = request(client, prompt, rng.randrange(1, 80), seed=number)
        expected = reference_output(sequence, CONTEXT_TOKENS)
        with client.submit([sequence]) as stream:
            if number % 4:
                tokens, _ = await read_to_end(stream)
                assert tokens == expected
                return True
            tokens = [token for delta in await stream.read() for token in delta.token_ids]
            assert tokens == expected[: len(tokens)]
            return False

    # As long as it runs, steps are slow enough for the others to pile up and fill the pool.
    brake = client.submit([request(client, [SLOW_TOKEN_ID], 120)])
    await brake.read()
    finished = await asyncio.gather(*(one(number) for number in range(32)))
    assert sum(finished) == 24
    brake.close()
    await until(lambda: client.load.used_blocks == 0)
    assert client.load.running_sequences == client.load.waiting_sequences == 0
    assert client.load.preemptions > 0


async def test_leaving_a_stream_frees_its_blocks_within_a_step(client: CoreClient) -> None:
    with client.submit([request(client, [SLOW_TOKEN_ID], 200)]) as stream:
        await stream.read()
        assert client.load.used_blocks > 0
        steps = client.load.steps
    await until(lambda: client.load.used_blocks == 0)
    assert client.load.steps <= steps + 2  # the step under way, and one whose frame was on its way


async def test_choices_of_a_request_are_admitted_together_and_differ(client: CoreClient) -> None:
    base = request(client, [4, 5], 12, seed=3)
    choices = [
        SequenceRequest(
            client.next_sequence_id(), [4, 5], base.sampling, base.stopping, choice_index=index
        )
        for index in range(3)
    ]
    stream = client.submit(choices)
    outputs: dict[int, list[int]] = {choice.sequence_id: [] for choice in choices}
    while deltas := await stream.read():
        for delta in deltas:
            outputs[delta.sequence_id] += delta.token_ids
    for choice in choices:
        assert outputs[choice.sequence_id] == reference_output(choice, CONTEXT_TOKENS)
    assert len({tuple(output) for output in outputs.values()}) == 3


@pytest.mark.parametrize(
    ("poison", "kind"), [(RAISING_TOKEN_ID, "RuntimeError"), (NAN_TOKEN_ID, "LogitsError")]
)
async def test_a_poisoned_sequence_fails_alone(client: CoreClient, poison: int, kind: str) -> None:
    healthy = [request(client, [SLOW_TOKEN_ID, number], 30, seed=number) for number in range(3)]
    streams = [client.submit([sequence]) for sequence in healthy]
    await streams[0].read()
    pid = client.core_pid
    _, finish = await read_to_end(client.submit([request(client, [1, poison])]))
    assert finish.reason is FinishReason.ERROR
    assert finish.error_kind == kind
    for sequence, stream in zip(healthy[1:], streams[1:], strict=True):
        tokens, _ = await read_to_end(stream)
        assert tokens == reference_output(sequence, CONTEXT_TOKENS)
    assert client.core_pid == pid
    await until(lambda: client.load.used_blocks == 0)


async def test_a_killed_core_fails_what_it_had_and_comes_back(client: CoreClient) -> None:
    stream = client.submit([request(client, [SLOW_TOKEN_ID], 200)])
    await stream.read()
    assert client.core_pid is not None
    os.kill(client.core_pid, signal.SIGKILL)
    with pytest.raises(CoreLostError):
        await read_to_end(stream)
    with pytest.raises(CoreUnavailableError):
        client.submit([request(client, [1])])
    assert not is_healthy(client)
    await until(lambda: is_healthy(client))
    await generates(client)


async def test_a_core_that_hangs_turns_unhealthy_and_is_replaced(client: CoreClient) -> None:
    first_pid = client.core_pid
    stream = client.submit([request(client, [STALLING_TOKEN_ID])])
    await until(lambda: not is_healthy(client))
    assert client.core_pid == first_pid  # noticed long before it is given up
    with pytest.raises(CoreLostError):
        await read_to_end(stream)
    await until(lambda: is_healthy(client))
    assert client.core_pid != first_pid
    await generates(client)


async def test_an_idle_core_stays_healthy_without_spinning(client: CoreClient) -> None:
    await generates(client)

    def cpu_ticks() -> int:
        with open(f"/proc/{client.core_pid}/stat") as file:
            fields = file.read().rsplit(")", 1)[1].split()
        return int(fields[11]) + int(fields[12])

    await asyncio.sleep(0.5)
    before = cpu_ticks()
    await asyncio.sleep(1.0)
    assert is_healthy(client)
    assert cpu_ticks() - before <= 5  # of 100 a second


async def test_a_full_queue_refuses_the_whole_request(client: CoreClient) -> None:
    base = request(client, [SLOW_TOKEN_ID], 100)
    many = [
        SequenceRequest(client.next_sequence_id(), [SLOW_TOKEN_ID], base.sampling, base.stopping)
        for _ in range(65)
    ]
    with pytest.raises(RefusedError) as refused:
        await client.submit(many).read()
    assert refused.value.kind == "QueueFullError"
    assert client.load.waiting_sequences == client.load.running_sequences == 0


@pytest.mark.parametrize(
    ("prompt", "max_tokens", "kind"),
    [
        ([], 1, "InvalidSequenceError"),
        ([64], 1, "InvalidSequenceError"),
        ([1] * CONTEXT_TOKENS, 1, "NeverFitsError"),
        ([1], CONTEXT_TOKENS, "NeverFitsError"),
    ],
)
async def test_what_can_never_run_is_refused_at_once(
    client: CoreClient, prompt: list[int], max_tokens: int, kind: str
) -> None:
    with pytest.raises(RefusedError) as refused:
        await client.submit([request(client, prompt, max_tokens)]).read()
    assert refused.value.kind == kind
    await generates(client)


async def test_draining_finishes_what_there_is_and_refuses_the_rest(client: CoreClient) -> None:
    sequence = request(client, [SLOW_TOKEN_ID], 20)
    stream = client.submit([sequence])
    await stream.read()
    draining = asyncio.create_task(client.drain(10))
    await until(lambda: client.load.draining)
    with pytest.raises(RefusedError) as refused:
        await client.submit([request(client, [1])]).read()
    assert refused.value.kind == "DrainingError"
    _, finish = await read_to_end(stream)
    assert finish.reason is FinishReason.LENGTH
    assert await draining == 0


async def test_draining_aborts_what_takes_too_long(client: CoreClient) -> None:
    stream = client.submit([request(client, [SLOW_TOKEN_ID], 200)])
    await stream.read()
    assert await client.drain(0.1) == 1
    _, finish = await read_to_end(stream)
    assert finish.reason is FinishReason.ABORTED
    assert client.load.used_blocks == 0


async def test_a_core_that_cannot_start_says_why() -> None:
    client = CoreClient(CoreSettings(model_path="missing"), command=COMMAND)
    with pytest.raises(CoreStartError, match="there is no such model"):
        await client.start()
    await client.close()


async def test_a_core_that_dies_before_it_is_ready_is_given_up_after_a_few_attempts() -> None:
    dying = (sys.executable, "-c", "raise SystemExit(3)")
    client = CoreClient(CoreSettings(model_path="hash"), command=dying)
    with pytest.raises(CoreStartError, match="exit code 3"):
        await client.start()
    await client.close()


@pytest.mark.parametrize("hanging", [False, True])
async def test_the_core_ends_by_itself_when_its_front_is_gone(hanging: bool) -> None:
    core = await CoreProcess.spawn(CoreSettings(model_path="hash"), COMMAND)
    events = core.events()
    assert isinstance(await anext(events), Ready)
    if hanging:
        core.send(Add([SequenceRequest(0, [STALLING_TOKEN_ID])]))
        await asyncio.sleep(0.2)
    # What the kernel does when a front dies: its end of the socket closes. Nobody waits or kills.
    core._writer.transport.abort()
    async with asyncio.timeout(10):
        assert await core._process.wait() == (1 if hanging else 0)
