"""Many generations on one stream: each is what it would be alone, and none harms another."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from typing import Any

import grpc
import pytest

from meshserve.v1 import engine_pb2, engine_pb2_grpc, types_pb2
from services.engine.core_client import CoreClient
from services.engine.hosted_model import HostedModel, State
from services.engine.hosting import Hosting
from services.engine.servicer import EngineServicer
from services.runtime.errors import Reason, ServiceError, from_session_status
from services.runtime.server_calls import CallInterceptor
from services.runtime.telemetry import Metrics
from tests.fakes.hash_model import RAISING_TOKEN_ID, SLOW_TOKEN_ID

METHOD = "meshserve.v1.EngineService/Generate"


@dataclass
class Answer:
    """What one generation has got."""

    tokens: dict[int, list[int]] = field(default_factory=dict)
    ends: dict[int, engine_pb2.TokenComplete] = field(default_factory=dict)
    messages: int = 0
    error: ServiceError | None = None
    is_finished: bool = False


class Engine:
    """An engine's server over the fake core, and one shared stream to it."""

    def __init__(self, client: CoreClient) -> None:
        self.client = client
        self.metrics = Metrics("engine")
        self.draining = asyncio.Event()
        self.answers: dict[int, Answer] = {}
        self.replica_id = ""

    async def __aenter__(self) -> Engine:
        self._server = grpc.aio.server(interceptors=[CallInterceptor(self.metrics)])
        models = Hosting([HostedModel("hash", self.client, state=State.READY)])
        servicer = EngineServicer(models, self.metrics, draining=self.draining)
        engine_pb2_grpc.add_EngineServiceServicer_to_server(servicer, self._server)
        port = self._server.add_insecure_port("127.0.0.1:0")
        await self._server.start()
        self._channel = grpc.aio.insecure_channel(f"127.0.0.1:{port}")
        self.stub: Any = engine_pb2_grpc.EngineServiceStub(self._channel)
        self.call = self.stub.GenerateMany()
        self.replica_id = (await self.call.read()).replica_id
        return self

    async def __aexit__(self, *_: object) -> None:
        self.call.cancel()
        await self._channel.close()
        await self._server.stop(0)

    async def send(self, *inputs: engine_pb2.GenerationInput) -> None:
        await self.call.write(engine_pb2.GenerateManyRequest(inputs=inputs))

    async def read(self) -> bool:
        """Takes in one message; False at the end of the stream."""
        message = await self.call.read()
        if message is grpc.aio.EOF:
            return False
        for output in message.outputs:
            answer = self.answers.setdefault(output.session_id, Answer())
            answer.messages += 1
            for delta in output.chunk.deltas:
                answer.tokens.setdefault(delta.index, []).extend(delta.token_ids)
            for complete in output.completes:
                answer.ends[complete.index] = complete
            answer.is_finished = output.finished
            if output.HasField("error"):
                answer.error = from_session_status(output.error, peer="engine")
        return True

    async def until_finished(self, *session_ids: int) -> list[Answer]:
        async with asyncio.timeout(20):
            while not all(
                each in self.answers and self.answers[each].is_finished for each in session_ids
            ):
                assert await self.read()
        return [self.answers[each] for each in session_ids]

    async def until_begun(self, session_id: int) -> None:
        async with asyncio.timeout(20):
            while session_id not in self.answers:
                assert await self.read()

    async def until_free(self) -> None:
        async with asyncio.timeout(10):
            while self.client.load.used_blocks:
                await asyncio.sleep(0.01)


@pytest.fixture
async def engine(client: CoreClient) -> AsyncIterator[Engine]:
    async with Engine(client) as started:
        yield started


def request(
    prompt: list[int], *, max_tokens: int = 8, **fields: Any
) -> engine_pb2.EngineServiceGenerateRequest:
    fields.setdefault("sampling", types_pb2.SamplingParams(seed=5))
    return engine_pb2.EngineServiceGenerateRequest(
        prompt=types_pb2.TokenIds(ids=prompt),
        stopping=types_pb2.StoppingCriteria(max_tokens=max_tokens, ignore_eos=True),
        **fields,
    )


def opening(
    session_id: int, prompt: list[int], timeout_ms: int | None = None, **fields: Any
) -> engine_pb2.GenerationInput:
    fields.setdefault("request_id", f"r{session_id}")
    return engine_pb2.GenerationInput(
        session_id=session_id,
        open=engine_pb2.GenerationOpen(request=request(prompt, **fields), timeout_ms=timeout_ms),
    )


def endless(session_id: int, **fields: Any) -> engine_pb2.GenerationInput:
    return opening(session_id, [SLOW_TOKEN_ID], max_tokens=200, **fields)


async def test_each_generation_is_what_it_would_be_alone(engine: Engine) -> None:
    prompts = {number: [1, 2, number] for number in range(3, 11)}
    await engine.send(*(opening(number, prompt) for number, prompt in prompts.items()))
    answers = await engine.until_finished(*prompts)
    for (number, prompt), answer in zip(prompts.items(), answers, strict=True):
        alone: list[int] = []
        async for message in engine.stub.Generate(request(prompt, request_id=f"alone{number}")):
            for delta in message.chunk.deltas:
                alone += delta.token_ids
        assert answer.tokens[0] == alone
        assert answer.ends[0].finish_reason == types_pb2.FINISH_REASON_LENGTH
        assert answer.ends[0].usage.completion_tokens == len(alone) == 8
        assert answer.error is None
    assert engine.replica_id
    await engine.until_free()


async def test_a_generation_that_cannot_be_leaves_the_others_alone(engine: Engine) -> None:
    await engine.send(
        endless(1),
        opening(2, []),
        opening(3, [RAISING_TOKEN_ID]),
        opening(4, [1], request_id="r1"),
        opening(5, [1], model="other"),
        opening(6, [4]),
    )
    *failed, fine = await engine.until_finished(2, 3, 4, 5, 6)
    assert [answer.error.reason for answer in failed if answer.error] == [
        Reason.INVALID_FIELD,
        Reason.SEQUENCE_FAILED,
        Reason.REQUEST_ID_IN_USE,
        Reason.MODEL_NOT_FOUND,
    ]
    assert len(fine.tokens[0]) == 8
    await engine.send(endless(1))
    (again,) = await engine.until_finished(1)
    assert again.error is not None
    assert again.error.field_violations[0][0] == "inputs.open"


async def test_a_generation_that_is_given_up_frees_its_blocks(engine: Engine) -> None:
    await engine.send(endless(1), endless(2))
    await engine.until_begun(1)
    await engine.until_begun(2)
    cancels = [engine_pb2.GenerationInput(session_id=each, cancel=True) for each in (1, 2, 3)]
    await engine.send(*cancels)
    await engine.until_free()
    assert engine.client.load.sampled_tokens < 100
    await engine.send(opening(4, [1]))
    (answer,) = await engine.until_finished(4)
    assert len(answer.tokens[0]) == 8


async def test_choices_may_end_while_the_others_go_on(engine: Engine) -> None:
    sampling = types_pb2.SamplingParams(temperature=1, n=3, seed=1)
    await engine.send(opening(1, [SLOW_TOKEN_ID], max_tokens=60, sampling=sampling))
    await engine.until_begun(1)
    await engine.send(engine_pb2.GenerationInput(session_id=1, abort_indexes=[1, 7]))
    (answer,) = await engine.until_finished(1)
    assert answer.ends[1].finish_reason == types_pb2.FINISH_REASON_ABORTED
    assert answer.ends[1].usage.completion_tokens < 60
    assert [len(answer.tokens[index]) for index in (0, 2)] == [60, 60]


async def test_a_deadline_ends_its_generation_alone(engine: Engine) -> None:
    await engine.send(endless(1, timeout_ms=300), opening(2, [SLOW_TOKEN_ID], max_tokens=30))
    late, fine = await engine.until_finished(1, 2)
    assert late.error is not None
    assert late.error.reason is Reason.DEADLINE_EXCEEDED
    assert len(fine.tokens[0]) == 30
    await engine.until_free()


async def test_a_lost_stream_frees_all_of_its_blocks(engine: Engine) -> None:
    await engine.send(*(endless(number) for number in range(4)))
    await engine.until_begun(3)
    engine.call.cancel()
    await engine.until_free()
    assert engine.client.load.sampled_tokens < 400


async def test_a_core_crash_is_unavailable_with_retry_info(engine: Engine) -> None:
    await engine.send(endless(1), endless(2))
    await engine.until_begun(1)
    await engine.until_begun(2)
    assert engine.client.core_pid is not None
    os.kill(engine.client.core_pid, signal.SIGKILL)
    for answer in await engine.until_finished(1, 2):
        assert answer.error is not None
        assert answer.error.reason is Reason.ENGINE_RESTARTED
        assert answer.error.retry_after_s
    await engine.send(opening(3, [1]))
    (answer,) = await engine.until_finished(3)
    assert answer.error is not None
    assert answer.error.reason is Reason.SERVICE_UNAVAILABLE


async def test_a_core_that_hangs_takes_nothing_new(engine: Engine) -> None:
    assert engine.client.core_pid is not None
    os.kill(engine.client.core_pid, signal.SIGSTOP)
    await asyncio.sleep(0.8)
    await engine.send(opening(1, [1]))
    (answer,) = await engine.until_finished(1)
    assert answer.error is not None
    assert answer.error.reason is Reason.SERVICE_UNAVAILABLE


async def test_a_replica_that_drains_finishes_what_it_has_and_ends_the_stream(
    engine: Engine,
) -> None:
    await engine.send(opening(1, [SLOW_TOKEN_ID], max_tokens=20))
    await engine.until_begun(1)
    engine.draining.set()
    await engine.send(opening(2, [1]))
    finished, refused = await engine.until_finished(1, 2)
    assert len(finished.tokens[0]) == 20
    assert refused.error is not None
    assert refused.error.reason is Reason.DRAINING
    async with asyncio.timeout(5):
        while await engine.read():
            pass
    assert await engine.call.code() is grpc.StatusCode.OK


async def test_each_generation_counts_as_a_call(engine: Engine) -> None:
    await engine.send(opening(1, [1]), opening(2, []), endless(3))
    await engine.until_finished(1, 2)
    await engine.send(engine_pb2.GenerationInput(session_id=3, cancel=True))
    await engine.until_free()

    def calls(code: str) -> float | None:
        labels = {"method": METHOD, "code": code}
        return engine.metrics.registry.get_sample_value("meshserve_rpc_server_calls_total", labels)

    assert [calls(code) for code in ("OK", "INVALID_ARGUMENT", "CANCELLED")] == [1, 1, 1]
    active = engine.metrics.registry.get_sample_value(
        "meshserve_rpc_server_active_calls", {"method": METHOD}
    )
    assert active == 0
