"""Ten thousand requests, many of them given up: the engine's memory is afterwards what it was."""

from __future__ import annotations

import asyncio
import contextlib
import random
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import psutil
import pytest

from meshserve.v1 import engine_pb2, engine_pb2_grpc, types_pb2
from tests.fakes.small_llama import VOCAB_SIZE, save_small_llama
from tests.support.ports import free_ports
from tests.support.process import ServiceProcess

pytestmark = pytest.mark.slow

REQUESTS = 10_000
WARM_UP_REQUESTS = 2_000  # fill caches, pools and arenas
CONCURRENCY = 32
ALLOWED_GROWTH = 0.01


@pytest.fixture
def engine(tmp_path: Path) -> Iterator[ServiceProcess]:
    checkpoint = tmp_path / "model"
    save_small_llama(checkpoint)
    settings: dict[str, Any] = {
        "models": {"small": {"source": str(checkpoint), "dtype": "float32"}},
        "engine": {
            "listen": f"127.0.0.1:{free_ports(1)[0]}",
            "metrics_listen": None,
            "device": "cpu",
            "kv_cache_bytes": 4 * 2**20,
            "max_running_sequences": 24,  # fewer than there are requests: some wait
        },
    }
    with ServiceProcess("engine", tmp_path, settings) as process:
        deadline = time.monotonic() + 60
        while process.health() != "SERVING":
            assert time.monotonic() < deadline, process.log
            time.sleep(0.1)
        yield process


class Callers:
    """So many callers at a time, each with its own request id, which only works where nothing of
    the request before is left."""

    def __init__(self, stub: Any, rng: random.Random) -> None:
        self._stub = stub
        self._rng = rng
        self.outcomes: Counter[str] = Counter()

    async def make(self, requests: int) -> None:
        left = iter(range(requests))

        async def one(name: str) -> None:
            for _ in left:
                self.outcomes[await self._call(name)] += 1

        await asyncio.gather(*(one(f"caller-{number}") for number in range(CONCURRENCY)))

    async def _call(self, name: str) -> str:
        rng = self._rng
        choices = rng.choice([1, 1, 1, 2])
        max_tokens = rng.randrange(1, 24)
        call = self._stub.Generate(
            engine_pb2.EngineServiceGenerateRequest(
                request_id=name,
                prompt=types_pb2.TokenIds(
                    ids=[rng.randrange(3, VOCAB_SIZE) for _ in range(rng.randrange(1, 80))]
                ),
                sampling=types_pb2.SamplingParams(
                    seed=rng.randrange(1 << 32), n=choices, temperature=rng.choice([0, 1])
                ),
                stopping=types_pb2.StoppingCriteria(max_tokens=max_tokens, ignore_eos=True),
            )
        )
        if rng.random() < 0.4:
            patience_s = rng.random() * 0.1
            with contextlib.suppress(asyncio.CancelledError, TimeoutError):
                async with asyncio.timeout(patience_s):
                    await self._read(call)
            call.cancel()
            # The engine may learn of it a little after its caller: the id is in use until then.
            await self._until_free(name)
            return "given up"
        completes = await self._read(call)
        assert completes == choices
        return "answered"

    async def _read(self, call: Any) -> int:
        completes = 0
        while (message := await call.read()) is not grpc.aio.EOF:
            completes += message.WhichOneof("event") == "complete"
        return completes

    async def _until_free(self, name: str) -> None:
        async with asyncio.timeout(60):
            while (await self._stub.Abort(engine_pb2.AbortRequest(request_id=name))).aborted:
                await asyncio.sleep(0.002)


async def test_ten_thousand_requests_leave_memory_as_it_was(engine: ServiceProcess) -> None:
    async with grpc.aio.insecure_channel(engine.address) as channel:
        stub: Any = engine_pb2_grpc.EngineServiceStub(channel)
        callers = Callers(stub, random.Random(1))
        await callers.make(WARM_UP_REQUESTS)
        before = await _at_rest(engine, stub)
        await callers.make(REQUESTS - WARM_UP_REQUESTS)
        after = await _at_rest(engine, stub)
    assert callers.outcomes.total() == REQUESTS
    assert callers.outcomes["given up"] > REQUESTS / 4
    print(dict(callers.outcomes), before, after)
    for what, amount in before.items():
        assert after[what] <= amount * (1 + ALLOWED_GROWTH), f"{what}: {before}, {after}"
    assert "ERROR" not in engine.log


async def _at_rest(engine: ServiceProcess, stub: Any) -> dict[str, int]:
    """What front and core hold once they have nothing to do and have idled.

    Their resident memory is added up: one per cent of the front's alone is less than the piece in
    which the interpreter takes memory from the system.
    """
    watch = stub.WatchLoad(engine_pb2.WatchLoadRequest(interval_ms=20))
    async with asyncio.timeout(60):
        while (load := await watch.read()).running_sequences or load.waiting_sequences:
            pass
        while (load := await watch.read()).kv_blocks_used:
            pass
    watch.cancel()
    await asyncio.sleep(1.0)  # upkeep is done once nothing has come for a moment
    front = psutil.Process(engine.pid)
    (core,) = front.children()
    return {
        "bytes": sum(process.memory_info().rss for process in (front, core)),
        "files of the front": front.num_fds(),
        "files of the core": core.num_fds(),
        "threads of the core": core.num_threads(),
    }
