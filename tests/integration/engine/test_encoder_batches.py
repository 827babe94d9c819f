"""Requests to an encoder through the real process loop and batcher: together, apart, and broken."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
from collections.abc import AsyncIterator
from typing import Any

import grpc
import pytest
import pytest_asyncio
from prometheus_client import generate_latest

from meshserve.v1 import engine_pb2, types_pb2
from services.engine.core.settings import BatcherSettings, CoreSettings
from services.runtime.errors import Reason, ServiceError
from tests.fakes.encoder_core import (
    COMMAND,
    CONTEXT_TOKENS,
    NAN_TOKEN_ID,
    RAISING_TOKEN_ID,
    SLOW_TOKEN_ID,
    STALLING_TOKEN_ID,
)
from tests.support.engine_server import EngineServer, engine_server

pytestmark = pytest.mark.asyncio(loop_scope="module")


@contextlib.asynccontextmanager
async def server_of(**batcher: Any) -> AsyncIterator[EngineServer]:
    settings = CoreSettings(model_path="sum", batcher=BatcherSettings(**batcher))
    async with engine_server(
        settings, command=COMMAND, stall_timeout_s=0.5, restart_stalled_after_s=1.5
    ) as server:
        yield server


LIMITS = {"max_sequences": 8, "max_tokens": 100, "max_waiting_sequences": 32}


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def server() -> AsyncIterator[EngineServer]:
    """One for all tests that leave it as they found it."""
    async with server_of(**LIMITS) as server:
        yield server


@pytest_asyncio.fixture(loop_scope="module")
async def own_server() -> AsyncIterator[EngineServer]:
    """For a test that ends it."""
    async with server_of(**LIMITS) as server:
        yield server


def embed(server: EngineServer, *inputs: list[int], request_id: str = "r", **fields: Any) -> Any:
    """The call, begun."""
    request = engine_pb2.EngineServiceEmbedRequest(
        request_id=request_id,
        inputs=[engine_pb2.EncoderInput(token_ids=token_ids) for token_ids in inputs],
        **fields,
    )
    return server.stub.Embed(request)


def sums(response: engine_pb2.EngineServiceEmbedResponse) -> list[float]:
    return [embedding.values[0] for embedding in response.embeddings]


def batch_sizes(response: engine_pb2.EngineServiceEmbedResponse) -> list[float]:
    return [embedding.values[1] for embedding in response.embeddings]


async def failure(call: Any) -> ServiceError:
    with pytest.raises(grpc.RpcError) as raised:
        await call
    return ServiceError.from_rpc_error(raised.value, peer="engine")


async def occupied(server: EngineServer) -> Any:
    """A call whose batch is being computed, which takes a while."""
    call = asyncio.ensure_future(embed(server, [SLOW_TOKEN_ID], request_id="slow"))
    steps = server.client.load.steps
    await asyncio.sleep(0.1)
    assert server.client.load.steps == steps
    return call


async def test_each_input_gets_its_own_answer_in_order(server: EngineServer) -> None:
    inputs = [[10] * length for length in (3, 40, 1, 7, 40, 2, 5, 64, 1, 1, 1, 9)]
    response = await embed(server, *inputs)
    assert sums(response) == [10 * len(token_ids) for token_ids in inputs]


async def test_requests_that_wait_together_are_computed_together(server: EngineServer) -> None:
    slow = await occupied(server)
    calls = [embed(server, [20, number], request_id=f"r{number}") for number in range(10, 15)]
    responses = [await call for call in calls]
    await slow
    assert [sums(response)[0] for response in responses] == [20 + n for n in range(10, 15)]
    assert all(batch_sizes(response) == [5] for response in responses)


async def test_a_wait_fills_batches_and_ends() -> None:
    async with server_of(max_sequences=3, longest_wait_ms=300) as server:
        first = asyncio.ensure_future(embed(server, [9], request_id="a"))
        await asyncio.sleep(0.05)
        assert not first.done()
        others = [embed(server, [9], request_id=name) for name in "bc"]
        async with asyncio.timeout(0.2):
            assert batch_sizes(await first) == [3]
        await asyncio.gather(*others)
        # Nobody else comes: it goes alone, but not before its time.
        begun = asyncio.get_running_loop().time()
        assert batch_sizes(await embed(server, [9])) == [1]
        assert asyncio.get_running_loop().time() - begun >= 0.29


@pytest.mark.parametrize("poison", [RAISING_TOKEN_ID, NAN_TOKEN_ID])
async def test_a_poisoned_input_fails_its_request_alone(server: EngineServer, poison: int) -> None:
    failed = server.client.load.failed_sequences
    slow = await occupied(server)
    good = embed(server, [20, 30], [40], request_id="good")
    bad = embed(server, [50], [poison], request_id="bad")
    error = await failure(bad)
    assert error.reason is Reason.SEQUENCE_FAILED
    assert error.metadata["input"] == "1"
    assert sums(await good) == [50, 40]
    assert server.client.load.failed_sequences == failed + 1
    await slow


async def test_a_caller_that_goes_away_leaves_the_queue(server: EngineServer) -> None:
    slow = await occupied(server)
    gone = embed(server, [10], [20], request_id="gone")
    stays = embed(server, [30], request_id="stays")
    await asyncio.sleep(0.1)
    gone.cancel()
    response = await stays
    assert batch_sizes(response) == [1]  # nobody computed what nobody waits for
    await slow
    # Its id is free again.
    assert sums(await embed(server, [10], request_id="gone")) == [10]


async def test_abort_ends_a_request(server: EngineServer) -> None:
    slow = await occupied(server)
    call = embed(server, [10], request_id="mine")
    await asyncio.sleep(0.1)
    answer = await server.stub.Abort(engine_pb2.AbortRequest(request_id="mine"))
    assert answer.aborted
    assert (await failure(call)).reason is Reason.ABORTED
    await slow


async def test_an_id_in_flight_is_refused(server: EngineServer) -> None:
    slow = await occupied(server)
    error = await failure(embed(server, [10], request_id="slow"))
    assert error.reason is Reason.REQUEST_ID_IN_USE
    await slow


@pytest.mark.parametrize(
    ("inputs", "fields", "path"),
    [
        ([], {}, "inputs"),
        ([[5]] * 33, {}, "inputs"),
        ([[5], []], {}, "inputs[1].token_ids"),
        ([[5, 100]], {}, "inputs[0].token_ids"),
        ([[5]], {"dimensions": 3}, "dimensions"),
        ([[5]], {"dimensions": 0}, "dimensions"),
        ([[5]], {"pooling": 77}, "pooling"),
    ],
)
async def test_a_bad_field_is_named(
    server: EngineServer, inputs: list[list[int]], fields: dict[str, Any], path: str
) -> None:
    error = await failure(embed(server, *inputs, **fields))
    assert error.reason is Reason.INVALID_FIELD
    assert [violation[0] for violation in error.field_violations] == [path]


async def test_an_input_that_is_too_long_is_refused(server: EngineServer) -> None:
    error = await failure(embed(server, [5], [5] * (CONTEXT_TOKENS + 1)))
    assert error.reason is Reason.PROMPT_TOO_LONG
    assert error.metadata["context_tokens"] == str(CONTEXT_TOKENS)
    assert [violation[0] for violation in error.field_violations] == ["inputs[1].token_ids"]


async def test_more_than_may_wait_are_refused(server: EngineServer) -> None:
    slow = await occupied(server)
    waiting = embed(server, *[[5]] * 30, request_id="waiting")
    await asyncio.sleep(0.1)
    error = await failure(embed(server, *[[5]] * 3, request_id="late"))
    assert error.reason is Reason.QUEUE_FULL
    assert error.retry_after_s
    await asyncio.gather(slow, waiting)


async def test_other_tasks_are_missing(server: EngineServer) -> None:
    inputs = [engine_pb2.EncoderInput(token_ids=[5])]
    for call in (
        server.stub.Classify(
            engine_pb2.EngineServiceClassifyRequest(request_id="r", inputs=inputs)
        ),
        server.stub.Score(engine_pb2.EngineServiceScoreRequest(request_id="r", inputs=inputs)),
    ):
        assert (await failure(call)).reason is Reason.CAPABILITY_MISSING
    generate = server.stub.Generate(
        engine_pb2.EngineServiceGenerateRequest(request_id="r", prompt=types_pb2.TokenIds(ids=[5]))
    )
    error = await failure(generate.read())
    assert error.reason is Reason.CAPABILITY_MISSING
    assert error.metadata["capability"] == "generate"


async def test_drain_answers_what_there_is_and_refuses_the_rest(own_server: EngineServer) -> None:
    slow = await occupied(own_server)
    waiting = embed(own_server, [20], request_id="waiting")
    await asyncio.sleep(0.1)
    drain = own_server.stub.Drain(engine_pb2.DrainRequest(timeout_ms=5000))
    await asyncio.sleep(0.05)
    assert (await failure(embed(own_server, [5], request_id="late"))).reason is Reason.DRAINING
    assert sums(await waiting) == [20]
    await slow
    response = await drain
    assert (response.finished_requests, response.aborted_requests) == (2, 0)


async def test_what_takes_longer_than_the_drain_is_aborted(own_server: EngineServer) -> None:
    stalled = embed(own_server, [STALLING_TOKEN_ID])
    await asyncio.sleep(0.1)
    response = await own_server.stub.Drain(engine_pb2.DrainRequest(timeout_ms=100))
    assert (response.finished_requests, response.aborted_requests) == (0, 1)
    assert (await failure(stalled)).reason is Reason.DRAINING


async def test_a_core_that_dies_fails_what_it_had(own_server: EngineServer) -> None:
    slow = await occupied(own_server)
    assert own_server.client.core_pid is not None
    os.kill(own_server.client.core_pid, signal.SIGKILL)
    assert (await failure(slow)).reason is Reason.ENGINE_RESTARTED
    async with asyncio.timeout(20):
        while True:
            with contextlib.suppress(grpc.RpcError):
                assert sums(await embed(own_server, [10])) == [10]
                return
            await asyncio.sleep(0.1)


async def test_a_core_that_hangs_is_replaced(own_server: EngineServer) -> None:
    error = await failure(embed(own_server, [STALLING_TOKEN_ID]))
    assert error.reason is Reason.ENGINE_RESTARTED


async def test_batches_are_counted(own_server: EngineServer) -> None:
    await embed(own_server, [10, 11, 12], [13])
    text = generate_latest(own_server.metrics.registry).decode()
    for line in (
        'meshserve_engine_encoded_inputs_total{model="m",task="embed"} 2.0',
        'meshserve_engine_steps_total{model="m"} 1.0',
        'meshserve_engine_prompt_tokens_total{model="m"} 4.0',
        'meshserve_engine_batch_sequences_sum{model="m"} 2.0',
        'meshserve_engine_queue_duration_seconds_count{model="m"} 2.0',
    ):
        assert line in text
