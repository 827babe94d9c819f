"""`python -m services.engine` as deployed: starts, answers, drains, exits, explains itself."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import socket
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import grpc
import pytest
import yaml
from grpc_health.v1 import health_pb2, health_pb2_grpc

from meshserve.v1 import engine_pb2, engine_pb2_grpc, types_pb2
from services.runtime.errors import Reason, ServiceError

NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING
SERVING = health_pb2.HealthCheckResponse.SERVING
# "<|im_start|>user\nWhat is the capital of France?<|im_end|>\n<|im_start|>assistant\n"
PROMPT = [1, 4093, 198, 1780, 314, 260, 3575, 282, 4649, 47, 2, 198, 1, 520, 9531, 198]
PARIS = 7042  # " Paris"

pytestmark = pytest.mark.slow


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


@contextlib.asynccontextmanager
async def engine_process(
    tmp_path: Path, port: int, **engine: Any
) -> AsyncIterator[asyncio.subprocess.Process]:
    models = engine.pop("models", {"smollm2-135m": {"source": "smollm2-135m", "dtype": "float32"}})
    document = {
        "models": models,
        "engine": {
            "listen": f"127.0.0.1:{port}",
            "metrics_listen": None,
            "device": "cpu",
            "kv_cache_bytes": 256 * 2**20,
            "drain_timeout_s": 20,
            **engine,
        },
    }
    config = tmp_path / "meshserve.yaml"
    config.write_text(yaml.safe_dump(document), encoding="utf-8")
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        "-m",
        "services.engine",
        "--config",
        str(config),
        stderr=asyncio.subprocess.PIPE,
    )
    try:
        yield process
    finally:
        with contextlib.suppress(ProcessLookupError):
            process.kill()
        await process.wait()


async def wait_until_serving(channel: grpc.aio.Channel) -> None:
    health = health_pb2_grpc.HealthStub(channel)
    request = health_pb2.HealthCheckRequest(service="meshserve.v1.EngineService")
    async with asyncio.timeout(120):
        while True:
            with contextlib.suppress(grpc.RpcError):
                if (await health.Check(request)).status == SERVING:
                    return
            await asyncio.sleep(0.1)


def generate_request(request_id: str, **fields: Any) -> engine_pb2.EngineServiceGenerateRequest:
    return engine_pb2.EngineServiceGenerateRequest(
        request_id=request_id,
        prompt=types_pb2.TokenIds(ids=PROMPT),
        sampling=types_pb2.SamplingParams(temperature=0),
        **fields,
    )


async def read_to_end(call: Any) -> None:
    while await call.read() is not grpc.aio.EOF:
        pass


def tokens_of(responses: list[engine_pb2.EngineServiceGenerateResponse]) -> list[int]:
    return [t for r in responses for delta in r.chunk.deltas for t in delta.token_ids]


async def test_the_demo_model_answers_and_the_process_stops_cleanly(
    tmp_path: Path, demo_model_path: Path
) -> None:
    port = free_port()
    async with (
        engine_process(tmp_path, port) as process,
        grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel,
    ):
        await wait_until_serving(channel)
        stub: Any = engine_pb2_grpc.EngineServiceStub(channel)
        info = await stub.GetModelInfo(engine_pb2.GetModelInfoRequest())
        assert info.model == "smollm2-135m"
        assert info.parameters > 130e6
        assert info.kernels
        responses = [r async for r in stub.Generate(generate_request("a"))]
        tokens = tokens_of(responses)
        assert PARIS in tokens
        complete = responses[-1].complete
        assert complete.finish_reason == types_pb2.FINISH_REASON_STOP
        assert complete.stop_token_id == tokens[-1] == 2
        # A call in flight when the process is told to stop is answered to its end.
        limit = types_pb2.StoppingCriteria(max_tokens=24, ignore_eos=True)
        call = stub.Generate(generate_request("b", stopping=limit))
        first = await call.read()
        process.send_signal(signal.SIGTERM)
        rest = [first]
        while (message := await call.read()) is not grpc.aio.EOF:
            rest.append(message)
        assert len(tokens_of(rest)) == 24
        async with asyncio.timeout(20):
            assert await process.wait() == 0


async def test_a_missing_model_is_explained(tmp_path: Path) -> None:
    models = {"mine": {"source": str(tmp_path / "nothing.gguf")}}
    async with engine_process(tmp_path, free_port(), models=models) as process:
        _, error = await process.communicate()
        assert process.returncode == 78
        assert b"nothing.gguf" in error
        assert b"Traceback" not in error


async def test_a_damaged_model_is_explained(tmp_path: Path, demo_model_path: Path) -> None:
    damaged = tmp_path / "damaged.gguf"
    with open(demo_model_path, "rb") as whole:
        damaged.write_bytes(whole.read(1 << 20))
    models = {"mine": {"source": str(damaged)}}
    async with engine_process(tmp_path, free_port(), models=models) as process:
        _, error = await process.communicate()
        assert process.returncode == 78
        assert b"damaged.gguf" in error
        assert b"Traceback" not in error


async def test_a_cache_too_small_for_a_block_is_explained(
    tmp_path: Path, demo_model_path: Path
) -> None:
    async with engine_process(tmp_path, free_port(), kv_cache_bytes=1000) as process:
        _, error = await process.communicate()
        assert process.returncode == 78
        assert b"holds no block" in error
        assert b"Traceback" not in error


async def test_a_core_that_hangs_in_a_decode_is_said_to_within_five_seconds_and_replaced(
    tmp_path: Path, demo_model_path: Path
) -> None:
    port = free_port()
    async with (
        engine_process(tmp_path, port) as process,
        grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel,
    ):
        await wait_until_serving(channel)
        stub: Any = engine_pb2_grpc.EngineServiceStub(channel)
        limit = types_pb2.StoppingCriteria(max_tokens=2000, ignore_eos=True)
        call = stub.Generate(generate_request("a", stopping=limit))
        await call.read()
        (core_pid,) = _children(process.pid)
        os.kill(core_pid, signal.SIGSTOP)
        health = health_pb2_grpc.HealthStub(channel)
        async with asyncio.timeout(5):
            while (await health.Check(health_pb2.HealthCheckRequest())).status == SERVING:
                await asyncio.sleep(0.05)
        with pytest.raises(grpc.aio.AioRpcError) as lost:
            await read_to_end(call)
        error = ServiceError.from_rpc_error(lost.value, peer="engine")
        assert lost.value.code() == grpc.StatusCode.UNAVAILABLE
        assert error.reason is Reason.ENGINE_RESTARTED
        assert error.retry_after_s
        await wait_until_serving(channel)
        assert _children(process.pid) != [core_pid]
        responses = [r async for r in stub.Generate(generate_request("b"))]
        assert PARIS in tokens_of(responses)


def _children(pid: int) -> list[int]:
    path = Path(f"/proc/{pid}/task/{pid}/children")
    return [int(child) for child in path.read_text().split()]
