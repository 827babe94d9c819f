"""The engine over gRPC: contract in, contract out, errors with details, spans."""

from __future__ import annotations

import asyncio
import math
import os
import signal
from collections.abc import AsyncIterator
from typing import Any, TypeAlias

import grpc
import pytest

from meshserve.v1 import engine_pb2, engine_pb2_grpc, types_pb2
from services.engine.core.messages import Sampling, SequenceRequest, Stopping
from services.engine.core_client import CoreClient
from services.engine.hosted_model import HostedModel, State
from services.engine.hosting import Hosting
from services.engine.servicer import EngineServicer
from services.runtime.errors import Reason, ServiceError
from services.runtime.server_calls import CallInterceptor
from services.runtime.telemetry import Metrics
from tests.fakes.core import CONTEXT_TOKENS
from tests.fakes.engines import reference_output
from tests.fakes.hash_model import RAISING_TOKEN_ID, SLOW_TOKEN_ID, STALLING_TOKEN_ID

Stub: TypeAlias = Any  # the asyncio form of EngineServiceStub exists in type stubs alone


@pytest.fixture
async def stub(client: CoreClient) -> AsyncIterator[Stub]:
    """A channel to a server with the engine's RPCs over the fake core."""
    metrics = Metrics("engine")
    server = grpc.aio.server(interceptors=[CallInterceptor(metrics)])
    models = Hosting([HostedModel("hash", client, aliases=("h",), state=State.READY)])
    servicer = EngineServicer(models, metrics, draining=asyncio.Event())
    engine_pb2_grpc.add_EngineServiceServicer_to_server(servicer, server)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
        yield engine_pb2_grpc.EngineServiceStub(channel)
    await server.stop(0)


def generate_request(prompt: list[int], **fields: Any) -> engine_pb2.EngineServiceGenerateRequest:
    fields.setdefault("request_id", "r")
    fields.setdefault("stopping", types_pb2.StoppingCriteria(max_tokens=8, ignore_eos=True))
    fields.setdefault("sampling", types_pb2.SamplingParams(seed=5))
    return engine_pb2.EngineServiceGenerateRequest(prompt=types_pb2.TokenIds(ids=prompt), **fields)


async def failure(call: Any) -> ServiceError:
    """The error that a call ends with."""
    with pytest.raises(grpc.RpcError) as raised:
        await (rest(call) if hasattr(call, "read") else call)
    return ServiceError.from_rpc_error(raised.value, peer="engine")


async def rest(call: Any) -> list[engine_pb2.EngineServiceGenerateResponse]:
    """The messages of a stream that were not read yet."""
    messages = []
    while (message := await call.read()) is not grpc.aio.EOF:
        messages.append(message)
    return messages


async def eventually_free(client: CoreClient) -> None:
    async with asyncio.timeout(10):
        while client.load.used_blocks:
            await asyncio.sleep(0.01)


async def test_tokens_stream_and_each_choice_completes(stub: Stub) -> None:
    request = generate_request(
        [1, 2, 3],
        sampling=types_pb2.SamplingParams(seed=5, n=2, temperature=0.8),
        logprobs=3,
    )
    tokens: dict[int, list[int]] = {0: [], 1: []}
    completes: dict[int, engine_pb2.TokenComplete] = {}
    positions = 0
    async for response in stub.Generate(request):
        if response.WhichOneof("event") == "chunk":
            for delta in response.chunk.deltas:
                assert delta.index not in completes
                tokens[delta.index] += delta.token_ids
                for token_id, position in zip(
                    delta.token_ids, delta.logprobs.positions, strict=True
                ):
                    positions += 1
                    assert position.chosen.token_id == token_id
                    assert position.chosen.logprob <= 0
                    assert len(position.top) == 3
        else:
            completes[response.complete.index] = response.complete
    assert positions == 16
    for index in (0, 1):
        alone = SequenceRequest(
            0,
            [1, 2, 3],
            Sampling(temperature=0.8, seed=5),
            Stopping(max_tokens=8, ignore_eos=True),
            choice_index=index,
        )
        assert tokens[index] == reference_output(alone, CONTEXT_TOKENS)
        complete = completes[index]
        assert complete.finish_reason == types_pb2.FINISH_REASON_LENGTH
        assert complete.usage.prompt_tokens == 3
        assert complete.usage.completion_tokens == 8
        timings = complete.timings
        assert (
            0
            < timings.queued_time_unix_ns
            <= timings.scheduled_time_unix_ns
            <= timings.first_token_time_unix_ns
            <= timings.finished_time_unix_ns
        )
        assert timings.steps >= 8


async def test_a_stop_sequence_ends_the_choice_and_is_named(stub: Stub) -> None:
    alone = SequenceRequest(
        0, [9], Sampling(temperature=0), Stopping(max_tokens=8, ignore_eos=True)
    )
    expected = reference_output(alone, CONTEXT_TOKENS)
    request = generate_request(
        [9],
        sampling=types_pb2.SamplingParams(temperature=0),
        stop_sequences=[
            types_pb2.TokenIds(ids=[expected[3], 59, 59]),
            types_pb2.TokenIds(ids=expected[2:4]),
        ],
    )
    responses = [response async for response in stub.Generate(request)]
    tokens = [t for r in responses for delta in r.chunk.deltas for t in delta.token_ids]
    complete = responses[-1].complete
    assert tokens == expected[:4]
    assert complete.finish_reason == types_pb2.FINISH_REASON_STOP
    assert complete.stop_sequence_index == 1
    assert not complete.HasField("stop_token_id")


async def test_a_bad_field_is_named_in_the_status(stub: Stub) -> None:
    sampling = types_pb2.SamplingParams(temperature=math.nan)
    error = await failure(stub.Generate(generate_request([1], sampling=sampling)))
    assert error.reason is Reason.INVALID_FIELD
    assert [violation[0] for violation in error.field_violations] == ["sampling.temperature"]


@pytest.mark.parametrize(
    ("method", "request_type"),
    [
        ("Embed", engine_pb2.EngineServiceEmbedRequest),
        ("Classify", engine_pb2.EngineServiceClassifyRequest),
        ("Score", engine_pb2.EngineServiceScoreRequest),
    ],
)
async def test_other_capabilities_are_missing(stub: Stub, method: str, request_type: Any) -> None:
    error = await failure(getattr(stub, method)(request_type()))
    assert error.reason is Reason.CAPABILITY_MISSING
    unknown = await failure(getattr(stub, method)(request_type(model="other")))
    assert unknown.reason is Reason.MODEL_NOT_FOUND


async def test_an_unknown_model_is_not_found(stub: Stub) -> None:
    error = await failure(stub.Generate(generate_request([1], model="other")))
    assert error.reason is Reason.MODEL_NOT_FOUND
    info = await stub.GetModelInfo(engine_pb2.GetModelInfoRequest(model="h"))
    assert info.model == "hash"
    assert info.context_tokens == CONTEXT_TOKENS


async def test_a_request_id_is_unique_among_those_in_flight(stub: Stub, client: CoreClient) -> None:
    first = stub.Generate(generate_request([SLOW_TOKEN_ID]))
    await first.read()
    error = await failure(stub.Generate(generate_request([1])))
    assert error.reason is Reason.REQUEST_ID_IN_USE
    first.cancel()
    await eventually_free(client)
    assert [r async for r in stub.Generate(generate_request([1]))]


async def test_abort_ends_the_request_with_a_status(stub: Stub, client: CoreClient) -> None:
    stopping = types_pb2.StoppingCriteria(max_tokens=200, ignore_eos=True)
    call = stub.Generate(generate_request([SLOW_TOKEN_ID], stopping=stopping))
    await call.read()
    assert (await stub.Abort(engine_pb2.AbortRequest(request_id="r"))).aborted
    assert (await failure(call)).reason is Reason.ABORTED
    await eventually_free(client)
    assert not (await stub.Abort(engine_pb2.AbortRequest(request_id="r"))).aborted
    assert (await failure(stub.Abort(engine_pb2.AbortRequest()))).reason is Reason.INVALID_FIELD


async def test_abort_may_end_one_choice_while_the_others_go_on(
    stub: Stub, client: CoreClient
) -> None:
    call = stub.Generate(
        generate_request(
            [SLOW_TOKEN_ID],
            sampling=types_pb2.SamplingParams(temperature=1, n=3, seed=1),
            stopping=types_pb2.StoppingCriteria(max_tokens=60, ignore_eos=True),
        )
    )
    first = await call.read()
    abort = engine_pb2.AbortRequest(request_id="r", indexes=[1, 7])
    assert (await stub.Abort(abort)).aborted
    ends = {
        response.complete.index: response.complete
        for response in [first, *await rest(call)]
        if response.HasField("complete")
    }
    assert ends[1].finish_reason == types_pb2.FINISH_REASON_ABORTED
    assert ends[1].usage.completion_tokens < 60
    for index in (0, 2):
        assert ends[index].finish_reason == types_pb2.FINISH_REASON_LENGTH
        assert ends[index].usage.completion_tokens == 60
    await eventually_free(client)
    assert not (await stub.Abort(abort)).aborted


async def test_a_caller_that_leaves_frees_its_blocks(stub: Stub, client: CoreClient) -> None:
    stopping = types_pb2.StoppingCriteria(max_tokens=200, ignore_eos=True)
    call = stub.Generate(generate_request([SLOW_TOKEN_ID], stopping=stopping))
    await call.read()
    call.cancel()
    await eventually_free(client)
    assert client.load.sampled_tokens < 50


async def test_a_deadline_ends_the_sequence(stub: Stub, client: CoreClient) -> None:
    stopping = types_pb2.StoppingCriteria(max_tokens=200, ignore_eos=True)
    request = generate_request([SLOW_TOKEN_ID], stopping=stopping)
    error = await failure(stub.Generate(request, timeout=0.3))
    assert error.reason is Reason.DEADLINE_EXCEEDED
    await eventually_free(client)
    assert (await failure(stub.Generate(request, timeout=0.001))).reason is (
        Reason.DEADLINE_EXCEEDED
    )
    await eventually_free(client)


async def test_a_poisoned_request_fails_alone(stub: Stub) -> None:
    error = await failure(stub.Generate(generate_request([RAISING_TOKEN_ID])))
    assert error.reason is Reason.SEQUENCE_FAILED
    assert "poisoned" not in error.message
    assert [r async for r in stub.Generate(generate_request([1]))]


async def test_a_core_crash_is_unavailable_with_retry_info(stub: Stub, client: CoreClient) -> None:
    stopping = types_pb2.StoppingCriteria(max_tokens=200, ignore_eos=True)
    call = stub.Generate(generate_request([SLOW_TOKEN_ID], stopping=stopping))
    await call.read()
    assert client.core_pid is not None
    os.kill(client.core_pid, signal.SIGKILL)
    error = await failure(call)
    assert error.reason is Reason.ENGINE_RESTARTED
    assert error.retry_after_s
    while_away = await failure(stub.Generate(generate_request([1])))
    assert while_away.reason is Reason.SERVICE_UNAVAILABLE
    async with asyncio.timeout(10):
        while client.core_pid is None or client.load.num_blocks == 0:
            await asyncio.sleep(0.05)
    assert [r async for r in stub.Generate(generate_request([1]))]


async def test_a_core_that_hangs_is_unavailable_with_retry_info(
    stub: Stub, client: CoreClient
) -> None:
    stopping = types_pb2.StoppingCriteria(max_tokens=200, ignore_eos=True)
    call = stub.Generate(generate_request([SLOW_TOKEN_ID], stopping=stopping))
    await call.read()
    hung = stub.Generate(generate_request([STALLING_TOKEN_ID], request_id="hung"))
    for lost in (call, hung):
        error = await failure(lost)
        assert error.reason is Reason.ENGINE_RESTARTED
        assert error.retry_after_s


async def test_load_is_watched(stub: Stub) -> None:
    watch = stub.WatchLoad(engine_pb2.WatchLoadRequest(interval_ms=10))
    first = await watch.read()
    assert first.running_sequences == 0
    stopping = types_pb2.StoppingCriteria(max_tokens=200, ignore_eos=True)
    call = stub.Generate(generate_request([SLOW_TOKEN_ID], stopping=stopping))
    await call.read()
    async with asyncio.timeout(3):
        while (load := await watch.read()).running_sequences == 0:
            pass
    assert load.running_sequences == 1
    assert load.kv_blocks_used > 0
    call.cancel()
    watch.cancel()
    error = await failure(stub.WatchLoad(engine_pb2.WatchLoadRequest(interval_ms=1)))
    assert error.field_violations[0][0] == "interval_ms"


async def test_a_drained_engine_has_finished_and_takes_nothing_new(stub: Stub) -> None:
    call = stub.Generate(generate_request([SLOW_TOKEN_ID]))
    await call.read()
    drained = asyncio.ensure_future(stub.Drain(engine_pb2.DrainRequest()))
    await asyncio.sleep(0.05)
    refused = await failure(stub.Generate(generate_request([1], request_id="late")))
    assert refused.reason is Reason.DRAINING
    assert (await rest(call))[-1].complete.finish_reason == types_pb2.FINISH_REASON_LENGTH
    assert (await drained).finished_requests == 1


async def test_draining_tells_those_it_cuts_off(stub: Stub) -> None:
    stopping = types_pb2.StoppingCriteria(max_tokens=200, ignore_eos=True)
    call = stub.Generate(generate_request([SLOW_TOKEN_ID], stopping=stopping))
    await call.read()
    drained = await stub.Drain(engine_pb2.DrainRequest(timeout_ms=50))
    assert drained.aborted_requests == 1
    assert (await failure(call)).reason is Reason.DRAINING
