"""The tokenizer as a process of its own: it serves the demo model and ends cleanly."""

from __future__ import annotations

import asyncio
import contextlib
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

from meshserve.v1 import tokenizer_pb2, tokenizer_pb2_grpc, types_pb2

SERVICE = "meshserve.v1.TokenizerService"


@contextlib.asynccontextmanager
async def tokenizer_process(
    tmp_path: Path, source: str, **section: Any
) -> AsyncIterator[tuple[asyncio.subprocess.Process, grpc.aio.Channel]]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{probe.getsockname()[1]}"
    config = tmp_path / "meshserve.yaml"
    section = {"listen": address, "metrics_listen": None, "drain_timeout_s": 100} | section
    config.write_text(
        yaml.safe_dump({"models": {"demo": {"source": source}}, "tokenizer": section})
    )
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        *("-m", "services.tokenizer", "--config", str(config)),
        stdout=asyncio.subprocess.DEVNULL,
        stderr=asyncio.subprocess.PIPE,
    )
    try:
        async with grpc.aio.insecure_channel(address) as channel:
            yield process, channel
    finally:
        if process.returncode is None:
            process.kill()
        await process.communicate()


async def until_serving(channel: grpc.aio.Channel) -> None:
    health = health_pb2_grpc.HealthStub(channel)
    request = health_pb2.HealthCheckRequest(service=SERVICE)
    async with asyncio.timeout(60):
        while True:
            with contextlib.suppress(grpc.aio.AioRpcError):
                response = await health.Check(request, wait_for_ready=True)
                if response.status == health_pb2.HealthCheckResponse.SERVING:
                    return
            await asyncio.sleep(0.05)


async def test_it_serves_the_demo_model_and_lets_streams_finish(
    tmp_path: Path, demo_model_path: Path
) -> None:
    async with tokenizer_process(tmp_path, str(demo_model_path)) as (process, channel):
        await until_serving(channel)
        stub = tokenizer_pb2_grpc.TokenizerServiceStub(channel)
        conversation = types_pb2.Conversation(
            messages=[types_pb2.ChatMessage(role=types_pb2.ROLE_USER, content="Hello!")]
        )
        prompt = await stub.ApplyChatTemplate(
            tokenizer_pb2.ApplyChatTemplateRequest(conversation=conversation)
        )
        assert [i for i in prompt.token_ids if i < 17] == [1, 2, 1, 2, 1]
        info = await stub.GetTokenizerInfo(tokenizer_pb2.GetTokenizerInfoRequest())
        assert (info.model, info.vocabulary_size) == ("demo", 49152)

        encoded = await stub.Encode(tokenizer_pb2.EncodeRequest(texts=["Bonjour, 世界!"]))
        token_ids = encoded.encoded[0].token_ids
        stream = stub.StreamDecode()
        opening = tokenizer_pb2.DecodeInput(
            session_id=1, open=tokenizer_pb2.DecodeOpen(), token_ids=token_ids[:2]
        )
        await stream.write(tokenizer_pb2.StreamDecodeRequest(inputs=[opening]))
        text = (await stream.read()).outputs[0].text
        # A stream that is under way when the process is asked to end is served to its end.
        process.send_signal(signal.SIGTERM)
        await asyncio.sleep(0.5)
        ending = tokenizer_pb2.DecodeInput(session_id=1, token_ids=token_ids[2:], finish=True)
        await stream.write(tokenizer_pb2.StreamDecodeRequest(inputs=[ending]))
        text += (await stream.read()).outputs[0].text
        assert text == "Bonjour, 世界!"
        assert await asyncio.wait_for(process.wait(), 60) == 0


@pytest.mark.parametrize(
    ("content", "says"),
    [(None, b"no-such.gguf"), (b"GGUF\x03\0\0\0", b"no-such.gguf"), (b"hello", b"not a GGUF file")],
)
async def test_a_model_that_cannot_be_loaded_ends_the_process_with_a_way_out(
    tmp_path: Path, content: bytes | None, says: bytes
) -> None:
    source = tmp_path / "no-such.gguf"
    if content is not None:
        source.write_bytes(content)
    async with tokenizer_process(tmp_path, str(source)) as (process, _):
        _, errors = await asyncio.wait_for(process.communicate(), 60)
        assert process.returncode == 78
        assert says in errors
        assert b"Traceback" not in errors
