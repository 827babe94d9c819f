"""Decoders and an encoder in one engine as deployed: each comes, goes and dies alone."""

from __future__ import annotations

import asyncio
import os
import signal
import statistics
import time
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

import grpc
import psutil
import pytest

from meshserve.v1 import engine_pb2, engine_pb2_grpc, types_pb2
from services.runtime.errors import Reason, ServiceError
from tests.fakes.small_llama import save_small_llama
from tests.support.ports import free_ports
from tests.support.process import ServiceProcess

pytestmark = pytest.mark.slow

DEMO, MINILM = "smollm2-135m", "all-minilm-l6-v2"
NUM_TOKENS = 100


@pytest.fixture(scope="module")
def process(
    tmp_path_factory: pytest.TempPathFactory, demo_model_path: Path, minilm_path: Path
) -> Iterator[ServiceProcess]:
    """An engine of four models, of which one is damaged and one waits for a request."""
    folder = tmp_path_factory.mktemp("engine")
    for name in ("lazy", "damaged"):
        save_small_llama(folder / name)
    weights = folder / "damaged/model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    settings: dict[str, Any] = {
        "models": {
            "damaged": {"source": str(folder / "damaged")},
            DEMO: {"source": DEMO},
            MINILM: {"source": MINILM},
            "lazy": {"source": str(folder / "lazy"), "load": "on_request", "sleep_after_s": 1.0},
        },
        "engine": {
            "listen": f"127.0.0.1:{free_ports(1)[0]}",
            "metrics_listen": None,
            "device": "cpu",
            "kv_cache_bytes": 64 * 2**20,
        },
    }
    with ServiceProcess("engine", folder, settings) as started:
        started.wait_until_healthy(180)
        yield started


@dataclass
class Engine:
    """What a test holds of it. `stub` is the asyncio form of EngineServiceStub."""

    process: ServiceProcess
    stub: Any

    async def models(self) -> dict[str, engine_pb2.EngineModel]:
        listed = await self.stub.ListModels(engine_pb2.EngineServiceListModelsRequest())
        return {model.name: model for model in listed.models}

    def cores(self) -> dict[int, int]:
        """The processes of the models: what each has for itself, in bytes."""
        return {
            child.pid: child.memory_full_info().uss
            for child in psutil.Process(self.process.pid).children(recursive=True)
        }

    def memory_bytes(self) -> int:
        """Of the engine and all that it has started, counting what they share once."""
        front = psutil.Process(self.process.pid)
        return sum(each.memory_full_info().pss for each in (front, *front.children(recursive=True)))


@pytest.fixture
async def engine(process: ServiceProcess) -> AsyncIterator[Engine]:
    async with grpc.aio.insecure_channel(process.address) as channel:
        yield Engine(process, engine_pb2_grpc.EngineServiceStub(channel))


@dataclass
class Stream:
    """What a long generation has brought, and when."""

    tokens: list[int] = field(default_factory=list)
    times_s: list[float] = field(default_factory=list)

    async def read(self, engine: Engine, request_id: str) -> None:
        async for message in engine.stub.Generate(generation(DEMO, request_id)):
            self.times_s.append(time.monotonic())
            self.tokens += [each for delta in message.chunk.deltas for each in delta.token_ids]

    def intervals_s(self) -> list[float]:
        return [late - early for early, late in pairwise(self.times_s)]


def generation(
    model: str, request_id: str, num_tokens: int = NUM_TOKENS
) -> engine_pb2.EngineServiceGenerateRequest:
    return engine_pb2.EngineServiceGenerateRequest(
        model=model,
        request_id=request_id,
        prompt=types_pb2.TokenIds(ids=[1, 40, 77, 90]),
        sampling=types_pb2.SamplingParams(temperature=0),
        stopping=types_pb2.StoppingCriteria(max_tokens=num_tokens, ignore_eos=True),
    )


def embedding(request_id: str) -> engine_pb2.EngineServiceEmbedRequest:
    each = engine_pb2.EncoderInput(token_ids=[101, 7592, 102])
    return engine_pb2.EngineServiceEmbedRequest(model=MINILM, request_id=request_id, inputs=[each])


async def refusal(call: Any) -> ServiceError:
    with pytest.raises(grpc.RpcError) as raised:
        await (call.read() if hasattr(call, "read") else call)
    return ServiceError.from_rpc_error(raised.value, peer="engine")


async def test_a_damaged_model_is_told_of_and_harms_no_other(engine: Engine) -> None:
    models = await engine.models()
    assert models["damaged"].state == engine_pb2.MODEL_STATE_FAILED
    assert "model.safetensors" in models["damaged"].problem
    assert models[DEMO].state == models[MINILM].state == engine_pb2.MODEL_STATE_READY
    refused = await refusal(engine.stub.Generate(generation("damaged", "r")))
    assert refused.reason is Reason.MODEL_NOT_LOADED
    again = await refusal(engine.stub.LoadModel(engine_pb2.LoadModelRequest(model="damaged")))
    assert again.reason is Reason.MODEL_NOT_LOADED
    assert "the model damaged cannot be loaded" in engine.process.log


async def test_a_request_without_a_name_goes_to_a_model_that_can_do_it(engine: Engine) -> None:
    request = generation("", "r", num_tokens=4)
    assert len([message async for message in engine.stub.Generate(request)]) >= 1
    unnamed = embedding("e")
    unnamed.model = ""
    (vector,) = (await engine.stub.Embed(unnamed)).embeddings
    assert len(vector.values) == 384


async def test_a_model_that_waits_for_a_request_comes_with_it_and_goes_by_itself(
    engine: Engine,
) -> None:
    assert (await engine.models())["lazy"].state == engine_pb2.MODEL_STATE_SLEEPING
    before = set(engine.cores())
    messages = [
        message async for message in engine.stub.Generate(generation("lazy", "r", num_tokens=8))
    ]
    assert messages[-1].complete.usage.completion_tokens == 8
    (core_pid,) = set(engine.cores()) - before
    async with asyncio.timeout(30):
        while psutil.pid_exists(core_pid):
            await asyncio.sleep(0.1)
    assert (await engine.models())["lazy"].state == engine_pb2.MODEL_STATE_SLEEPING


async def test_a_stream_goes_on_whatever_becomes_of_the_other_models(
    engine: Engine, capsys: pytest.CaptureFixture[str]
) -> None:
    stub = engine.stub
    alone, disturbed = Stream(), [Stream()]
    await alone.read(engine, "alone")
    vector = list((await stub.Embed(embedding("before"))).embeddings[0].values)
    is_over = asyncio.Event()

    async def keep_reading() -> None:
        while not is_over.is_set():
            await disturbed[-1].read(engine, "disturbed")
            disturbed.append(Stream())

    reading = asyncio.create_task(keep_reading())
    took_s: dict[str, float] = {}

    async def change(name: str, call: Any) -> None:
        started_s = time.monotonic()
        await call
        took_s[name] = time.monotonic() - started_s

    await change("sleep", stub.SleepModel(engine_pb2.SleepModelRequest(model=MINILM)))
    await change("wake", stub.WakeModel(engine_pb2.WakeModelRequest(model=MINILM)))
    await change("unload", stub.UnloadModel(engine_pb2.UnloadModelRequest(model=MINILM)))
    await change("load", stub.LoadModel(engine_pb2.LoadModelRequest(model=MINILM)))
    demo_pid = max(engine.cores(), key=lambda pid: engine.cores()[pid])
    (encoder_pid,) = set(engine.cores()) - {demo_pid}
    os.kill(encoder_pid, signal.SIGKILL)
    async with asyncio.timeout(60):
        while True:
            try:
                after = (await stub.Embed(embedding("after"))).embeddings[0]
            except grpc.RpcError:
                await asyncio.sleep(0.1)
            else:
                break
    is_over.set()
    await reading
    assert list(after.values) == vector
    assert demo_pid in engine.cores()
    assert len(alone.tokens) == NUM_TOKENS
    assert all(each.tokens == alone.tokens for each in disturbed[:-1])
    intervals_s = [interval_s for each in disturbed for interval_s in each.intervals_s()]
    longest_s = max(intervals_s)
    with capsys.disabled():
        changes = ", ".join(f"{name} {seconds:.2f} s" for name, seconds in took_s.items())
        print(
            f"\n{MINILM}: {changes}; between messages of streams beside it: median "
            f"{1000 * statistics.median(intervals_s):.0f} ms, longest "
            f"{1000 * longest_s:.0f} ms (alone {1000 * statistics.median(alone.intervals_s()):.0f} "
            f"and {1000 * max(alone.intervals_s()):.0f} ms)"
        )
    # No load, end or restart of another holds a stream up for as long as it takes itself.
    # (A machine that does much else holds up what is alone as well.)
    assert longest_s < 1.0 + 2 * max(alone.intervals_s())


async def test_sleep_gives_memory_back_and_waking_brings_the_same_model(
    engine: Engine, capsys: pytest.CaptureFixture[str]
) -> None:
    stub, before, after = engine.stub, Stream(), Stream()
    await before.read(engine, "before")
    awake_bytes = engine.memory_bytes()
    info = await stub.GetModelInfo(engine_pb2.GetModelInfoRequest(model=DEMO))
    freed = await stub.SleepModel(engine_pb2.SleepModelRequest(model=DEMO))
    asleep_bytes = engine.memory_bytes()
    assert len(engine.cores()) == 1
    assert freed.freed_bytes > 150 * 2**20
    assert awake_bytes - asleep_bytes > 150 * 2**20
    assert await stub.GetModelInfo(engine_pb2.GetModelInfoRequest(model=DEMO)) == info
    started_s = time.monotonic()
    await asyncio.gather(
        after.read(engine, "after"), *(Stream().read(engine, f"{n}") for n in range(3))
    )
    wake_s = after.times_s[0] - started_s
    assert len(engine.cores()) == 2
    assert after.tokens == before.tokens
    with capsys.disabled():
        print(
            f"\n{DEMO}: asleep it gives {(awake_bytes - asleep_bytes) / 2**20:.0f} MiB back, and a "
            f"request that wakes it has its first token after {wake_s:.2f} s"
        )


async def test_an_engine_ends_cleanly_while_a_model_wakes(engine: Engine) -> None:
    await engine.stub.SleepModel(engine_pb2.SleepModelRequest(model=DEMO))
    cores = psutil.Process(engine.process.pid).children(recursive=True)
    call = engine.stub.Generate(generation(DEMO, "late"))
    await asyncio.sleep(0.3)
    os.kill(engine.process.pid, signal.SIGTERM)
    assert (await refusal(call)).code is grpc.StatusCode.UNAVAILABLE
    assert await asyncio.to_thread(engine.process.wait, 60) == 0
    psutil.wait_procs(cores, timeout=10)
    assert not any(core.is_running() for core in cores)
