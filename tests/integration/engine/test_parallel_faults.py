"""Ranks that die, hang or fail: the engine says so, starts again, and leaves nothing behind."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
import time
from collections.abc import AsyncIterator

import psutil
import pytest

from meshserve.v1 import engine_pb2, types_pb2
from services.engine.core.messages import FinishReason, Sampling, SequenceRequest, Stopping
from services.engine.core.settings import CoreSettings
from services.engine.core_client import CoreClient
from services.engine.request_stream import CoreLostError, CoreUnavailableError, RequestStream
from tests.fakes.decoder_families import save_model, served
from tests.fakes.faulty_ranks import ALL_FAIL, COMMAND, ONE_FAILS, ONE_HANGS
from tests.support.engine_server import engine_server
from tests.support.ports import free_ports
from tests.support.waiting import until

PROMPT = [5, 6, 7]


@pytest.fixture(scope="module")
def settings(tmp_path_factory: pytest.TempPathFactory) -> CoreSettings:
    """Those of a core of two ranks."""
    path = tmp_path_factory.mktemp("llama")
    save_model("llama", path, **served("llama", max_position_embeddings=4096))
    return CoreSettings(
        model_path=str(path),
        device="cpu",
        dtype="float32",
        threads=1,
        cpu_kernels="off",
        kv_cache_memory_bytes=1 << 22,
        max_batch_tokens=32,
        max_running_sequences=8,
        tensor_parallel=2,
    )


@pytest.fixture
async def client(settings: CoreSettings) -> AsyncIterator[CoreClient]:
    client = CoreClient(settings, command=COMMAND)
    await client.start()
    yield client
    pids = ranks(client)
    await client.close()
    assert not any(map(psutil.pid_exists, pids))


def ranks(client: CoreClient) -> list[int]:
    """The processes of the core, rank 0 first."""
    assert client.core_pid is not None
    core = psutil.Process(client.core_pid)
    return [core.pid, *(child.pid for child in core.children())]


def submit(client: CoreClient, prompt: list[int], max_tokens: int = 8) -> RequestStream:
    stopping = Stopping(max_tokens=max_tokens, ignore_eos=True)
    number = client.next_sequence_id()
    return client.submit([SequenceRequest(number, prompt, Sampling(temperature=0), stopping)])


async def tokens_of(stream: RequestStream) -> list[int]:
    tokens: list[int] = []
    while deltas := await stream.read():
        for delta in deltas:
            tokens += delta.token_ids
    return tokens


async def under_way(client: CoreClient) -> RequestStream:
    """A stream that goes on for long."""
    stream = submit(client, PROMPT, 3000)
    await stream.read()
    return stream


def is_replaced(client: CoreClient, pid: int) -> bool:
    return _is_healthy(client) and client.core_pid != pid


async def all_end_and_begin_anew(
    client: CoreClient, pids: list[int], stream: RequestStream | None, within_s: float
) -> None:
    """The request is lost in time, no process is left, and the next core is as good as this."""
    started_s = time.monotonic()
    if stream is not None:
        with pytest.raises(CoreLostError):
            await tokens_of(stream)
    await until(lambda: not any(map(_runs, pids)), within_s)
    assert time.monotonic() - started_s < within_s
    await until(lambda: is_replaced(client, pids[0]), 60)


def _runs(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


async def test_a_rank_that_is_killed_ends_the_core_which_starts_again(
    client: CoreClient, caplog: pytest.LogCaptureFixture
) -> None:
    expected = await tokens_of(submit(client, PROMPT))
    pids, stream = ranks(client), await under_way(client)
    os.kill(pids[1], signal.SIGKILL)
    await all_end_and_begin_anew(client, pids, stream, within_s=10)
    assert "the engine core ended: FatalEngineError: rank 1 has ended" in caplog.text
    assert await tokens_of(submit(client, PROMPT)) == expected


@pytest.mark.slow
async def test_a_rank_that_dies_while_nobody_asks_and_one_that_stands_still_are_noticed(
    client: CoreClient, caplog: pytest.LogCaptureFixture
) -> None:
    pids = ranks(client)
    os.kill(pids[1], signal.SIGKILL)
    await all_end_and_begin_anew(client, pids, None, within_s=10)
    assert "FatalEngineError: rank 1 has ended" in caplog.text
    pids, stream = ranks(client), await under_way(client)
    submit(client, ONE_HANGS)
    await all_end_and_begin_anew(client, pids, stream, within_s=20)
    assert "FatalEngineError: rank 1 has been silent" in caplog.text


@pytest.mark.slow
async def test_a_rank_that_fails_by_itself_ends_the_core_and_rank_0_takes_the_others_with_it(
    client: CoreClient, caplog: pytest.LogCaptureFixture
) -> None:
    expected = await tokens_of(submit(client, PROMPT))
    pids, stream = ranks(client), await under_way(client)
    submit(client, ONE_FAILS)
    await all_end_and_begin_anew(client, pids, stream, within_s=20)
    assert "rank 1 failed in a step: ValueError: a poisoned prompt" in caplog.text
    pids, stream = ranks(client), await under_way(client)
    os.kill(pids[0], signal.SIGKILL)
    await all_end_and_begin_anew(client, pids, stream, within_s=10)
    assert await tokens_of(submit(client, PROMPT)) == expected


@pytest.mark.slow
async def test_what_a_core_of_several_ranks_survives(client: CoreClient) -> None:
    expected = await tokens_of(submit(client, PROMPT, 100))
    pids = ranks(client)
    # Signals that reach a whole group of processes.
    stream = submit(client, PROMPT, 100)
    for pid in pids:
        os.kill(pid, signal.SIGTERM)
        os.kill(pid, signal.SIGINT)
    assert await tokens_of(stream) == expected
    # A sequence on which all ranks fail alike fails alone.
    good, poisoned = submit(client, PROMPT, 100), submit(client, ALL_FAIL)
    finishes = [delta.finish for delta in await poisoned.read()]
    assert [finish.reason for finish in finishes if finish] == [FinishReason.ERROR]
    assert [finish.error for finish in finishes if finish] == ["a poisoned prompt"]
    assert await tokens_of(good) == expected
    assert ranks(client) == pids


@pytest.mark.slow
async def test_ranks_serve_what_is_asked_over_grpc(settings: CoreSettings) -> None:
    async with engine_server(settings, command=COMMAND) as server:
        calls = [
            server.stub.Generate(
                engine_pb2.EngineServiceGenerateRequest(
                    request_id=str(number),
                    prompt=types_pb2.TokenIds(ids=PROMPT),
                    sampling=types_pb2.SamplingParams(temperature=0),
                    stopping=types_pb2.StoppingCriteria(max_tokens=8, ignore_eos=True),
                )
            )
            for number in range(4)
        ]
        answers = await asyncio.gather(*map(_tokens, calls))
        assert answers == [await tokens_of(submit(server.client, PROMPT))] * 4


async def _tokens(call: object) -> list[int]:
    found: list[int] = []
    async for response in call:  # type: ignore[attr-defined]
        for delta in response.chunk.deltas:
            found += delta.token_ids
    return found


@pytest.mark.slow
async def test_ranks_of_another_machine_join_wait_for_the_next_engine_and_end_with_it(
    settings: CoreSettings, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in {
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(free_ports(1)[0]),
        "LOCAL_WORLD_SIZE": "1",
    }.items():
        monkeypatch.setenv(name, value)
    command = (sys.executable, "-m", "services.engine.core.parallel.machine")
    machine = psutil.Popen(command, env=os.environ | {"GROUP_RANK": "1"})
    client = CoreClient(settings)
    try:
        await client.start()
        expected = await tokens_of(submit(client, PROMPT))
        assert len(ranks(client)) == 1
        (rank,) = machine.children()
        os.kill(ranks(client)[0], signal.SIGKILL)
        await until(lambda: client.core_pid is None)
        await until(lambda: _is_healthy(client), 60)
        assert await tokens_of(submit(client, PROMPT)) == expected
        assert machine.children() == [rank]
        # It waits for what rank 0 has yet to do.
        machine.terminate()
        assert await tokens_of(submit(client, PROMPT)) == expected
        assert machine.is_running()
    finally:
        await client.close()
        assert await asyncio.to_thread(machine.wait, 20) == 0


def _is_healthy(client: CoreClient) -> bool:
    try:
        client.check_health()
    except CoreUnavailableError:
        return False
    return True
