"""Each client reads its server's stream, against small servers that speak as the real ones do."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

import pytest
from aiohttp import web

from benchmarks.load import BenchmarkError
from benchmarks.systems.http_client import (
    CompletionAPI,
    LlamaCppCompletions,
    VLLMCompletions,
    event_payload,
    http_clients,
)
from benchmarks.systems.openvino_client import openvino_clients
from benchmarks.systems.server_process import ClientFactory, NotServingError
from benchmarks.workloads import Request

REQUEST = Request((11, 12, 13), 3)

VLLM_STREAM = [
    {"choices": [{"index": 0, "text": " a"}], "usage": None},
    {"choices": [{"index": 0, "text": ""}], "usage": None},  # a token that completes no character
    {"choices": [{"index": 0, "text": "b", "finish_reason": "length"}], "usage": None},
    {"choices": [], "usage": {"prompt_tokens": 3, "completion_tokens": 3}},
]
LLAMACPP_STREAM = [
    {"index": 0, "content": " a", "stop": False},
    {"index": 0, "content": "bc", "stop": False},
    {"index": 0, "content": "", "stop": True, "tokens_predicted": 3},
]


@asynccontextmanager
async def http_server(
    path: str, events: list[dict[str, Any]], status: int = 200
) -> AsyncIterator[tuple[int, list[dict[str, Any]]]]:
    asked: list[dict[str, Any]] = []

    async def answer(request: web.Request) -> web.StreamResponse:
        asked.append(await request.json())
        if status != 200:
            return web.Response(status=status, text="no")
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
        await response.prepare(request)
        for event in events:
            await response.write(b"data: " + json.dumps(event).encode() + b"\n\n")
        await response.write(b"data: [DONE]\n\n")
        return response

    application = web.Application()
    application.router.add_post(path, answer)
    runner = web.AppRunner(application)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    try:
        yield runner.addresses[0][1], asked
    finally:
        await runner.cleanup()


async def ask(clients: ClientFactory) -> tuple[int, int]:
    """How many messages with tokens came, and how many tokens the server says there were."""
    messages = 0

    def arrived() -> None:
        nonlocal messages
        messages += 1

    async with clients() as client:
        tokens = await client.generate(REQUEST, arrived)
    return messages, tokens


async def test_vllm_is_asked_for_a_fixed_length_and_counts_by_its_usage() -> None:
    async with http_server("/v1/completions", VLLM_STREAM) as (port, asked):
        assert await ask(http_clients(port, VLLMCompletions("m"))) == (3, 3)

    assert asked[0]["prompt"] == [11, 12, 13]
    assert asked[0]["ignore_eos"] is True
    assert asked[0]["max_tokens"] == 3
    assert asked[0]["temperature"] == 0


async def test_llamacpp_is_asked_for_a_fixed_length_and_counts_by_its_last_event() -> None:
    async with http_server("/completion", LLAMACPP_STREAM) as (port, asked):
        assert await ask(http_clients(port, LlamaCppCompletions())) == (2, 3)

    assert asked[0]["prompt"] == [11, 12, 13]
    assert asked[0]["ignore_eos"] is True
    assert asked[0]["n_predict"] == 3
    assert asked[0]["temperature"] == 0


@pytest.mark.parametrize("api", [VLLMCompletions("m"), LlamaCppCompletions()])
async def test_an_error_in_a_stream_is_no_answer(api: CompletionAPI) -> None:
    async with http_server(api.path, [{"error": {"message": "out of memory"}}]) as (port, _):
        with pytest.raises(BenchmarkError, match="out of memory"):
            await ask(http_clients(port, api))


async def test_a_stream_without_a_count_is_no_answer() -> None:
    async with http_server("/completion", LLAMACPP_STREAM[:-1]) as (port, _):
        with pytest.raises(BenchmarkError, match="without saying how many"):
            await ask(http_clients(port, LlamaCppCompletions()))


async def test_a_server_that_loads_is_told_from_one_that_refuses() -> None:
    async with http_server("/completion", [], status=503) as (port, _):
        with pytest.raises(NotServingError):
            await ask(http_clients(port, LlamaCppCompletions()))
    async with http_server("/completion", [], status=400) as (port, _):
        with pytest.raises(BenchmarkError, match="status 400"):
            await ask(http_clients(port, LlamaCppCompletions()))
    with pytest.raises(NotServingError):
        await ask(http_clients(port, LlamaCppCompletions()))
    with pytest.raises(NotServingError):
        await ask(openvino_clients(port))


@pytest.mark.parametrize("line", [b"\n", b": ping\n", b"event: x\n", b"data: [DONE]\n", b"data:\n"])
def test_lines_that_carry_nothing_are_passed_over(line: bytes) -> None:
    assert event_payload(line) is None


@asynccontextmanager
async def line_server(
    answer: Callable[[dict[str, Any]], list[dict[str, int]]],
) -> AsyncIterator[int]:
    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while line := await reader.readline():
            for each in answer(json.loads(line)):
                writer.write(json.dumps(each).encode() + b"\n")
        writer.close()

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    async with server:
        yield server.sockets[0].getsockname()[1]


async def test_openvino_answers_many_requests_over_one_connection() -> None:
    def answer(message: dict[str, Any]) -> list[dict[str, int]]:
        assert message["prompt_token_ids"] == [11, 12, 13]
        identity = message["id"]
        return [
            {"id": identity, "tokens": 1},
            {"id": identity, "tokens": 2},
            {"id": identity, "done": message["max_tokens"]},
        ]

    async with line_server(answer) as port, openvino_clients(port)() as client:
        counts = [0, 0]

        def note(index: int) -> None:
            counts[index] += 1

        tokens = await asyncio.gather(
            client.generate(REQUEST, lambda: note(0)), client.generate(REQUEST, lambda: note(1))
        )
    assert list(tokens) == [3, 3]
    assert counts == [2, 2]


async def test_an_openvino_server_that_goes_away_fails_what_is_open() -> None:
    async def hang_up(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readline()
        writer.close()

    server = await asyncio.start_server(hang_up, "127.0.0.1", 0)
    async with server:
        port = server.sockets[0].getsockname()[1]
        with pytest.raises(BenchmarkError, match="closed the connection"):
            await asyncio.wait_for(ask(openvino_clients(port)), timeout=10)
