"""Two models in one engine: what happens to one is nothing to the other."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Any

import grpc
import psutil
import pytest

from meshserve.v1 import engine_pb2, engine_pb2_grpc, types_pb2
from services.engine.core.settings import CoreSettings
from services.engine.core_client import CoreClient
from services.engine.hosted_model import HostedModel, State
from services.engine.hosting import Hosting
from services.engine.metrics import read_models
from services.engine.servicer import EngineServicer
from services.runtime.errors import Reason, ServiceError, from_session_status
from services.runtime.server_calls import CallInterceptor
from services.runtime.telemetry import Metrics
from tests.fakes.core import COMMAND
from tests.fakes.hash_model import SLOW_TOKEN_ID

LONG = types_pb2.StoppingCriteria(max_tokens=200, ignore_eos=True)


@dataclass
class Engine:
    """An engine of two models over fake cores: `awake` is in memory, `asleep` is not yet."""

    stub: Any
    awake: HostedModel
    asleep: HostedModel
    metrics: Metrics

    async def state(self, name: str) -> engine_pb2.EngineModel:
        listed = await self.stub.ListModels(engine_pb2.EngineServiceListModelsRequest())
        return next(each for each in listed.models if each.name == name)


@pytest.fixture
async def engine() -> AsyncIterator[Engine]:
    settings = CoreSettings(model_path="hash", max_batch_tokens=64, max_running_sequences=8)
    awake, asleep = (CoreClient(settings, command=COMMAND) for _ in range(2))
    await awake.start()
    models = [
        HostedModel("awake", awake, state=State.READY),
        HostedModel("asleep", asleep, state=State.SLEEPING),
    ]
    metrics, hosting = Metrics("engine"), Hosting(models)
    read_models(metrics, hosting)
    server = grpc.aio.server(interceptors=[CallInterceptor(metrics)])
    servicer = EngineServicer(hosting, metrics, draining=asyncio.Event())
    engine_pb2_grpc.add_EngineServiceServicer_to_server(servicer, server)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
        yield Engine(engine_pb2_grpc.EngineServiceStub(channel), *models, metrics)
    await server.stop(0)
    await hosting.close()


def request(model: str, request_id: str, **fields: Any) -> engine_pb2.EngineServiceGenerateRequest:
    fields.setdefault("prompt", types_pb2.TokenIds(ids=[1, 2]))
    fields.setdefault("stopping", types_pb2.StoppingCriteria(max_tokens=8, ignore_eos=True))
    return engine_pb2.EngineServiceGenerateRequest(model=model, request_id=request_id, **fields)


def slow_request(model: str, request_id: str) -> engine_pb2.EngineServiceGenerateRequest:
    return request(model, request_id, prompt=types_pb2.TokenIds(ids=[SLOW_TOKEN_ID]), stopping=LONG)


async def num_tokens(call: Any) -> int:
    return sum(
        len(delta.token_ids)
        for message in [m async for m in call]
        for delta in message.chunk.deltas
    )


async def failure(call: Any) -> ServiceError:
    with pytest.raises(grpc.RpcError) as raised:
        await (call.read() if hasattr(call, "read") else call)
    return ServiceError.from_rpc_error(raised.value, peer="engine")


async def test_streams_of_a_model_go_on_while_another_comes_and_goes(engine: Engine) -> None:
    stub = engine.stub
    stream = asyncio.create_task(num_tokens(stub.Generate(slow_request("awake", "long"))))
    woken = await stub.WakeModel(engine_pb2.WakeModelRequest(model="asleep"))
    assert woken.model.state == engine_pb2.MODEL_STATE_READY
    assert woken.model.memory_bytes > 0
    core = psutil.Process(engine.asleep.client.core_pid or 0)
    freed = await stub.SleepModel(engine_pb2.SleepModelRequest(model="asleep"))
    assert freed.freed_bytes > 0
    assert not core.is_running()
    assert (await engine.state("asleep")).memory_bytes == 0
    assert await num_tokens(stub.Generate(request("asleep", "wakes it"))) == 8
    os.kill(engine.asleep.client.core_pid or 0, signal.SIGKILL)
    await stub.UnloadModel(engine_pb2.UnloadModelRequest(model="asleep"))
    assert await num_tokens(stub.Generate(slow_request("awake", "another"))) == 200
    assert await stream == 200


async def test_a_model_that_was_unloaded_is_asked_for_in_vain(engine: Engine) -> None:
    stub = engine.stub
    call = stub.Generate(slow_request("awake", "r"))
    await call.read()
    unload = engine_pb2.UnloadModelRequest(model="awake", timeout_ms=100)
    assert (await stub.UnloadModel(unload)).aborted_requests == 1
    for model, message in (
        ("Generate", request("awake", "r2")),
        ("GetModelInfo", engine_pb2.GetModelInfoRequest(model="awake")),
        ("SleepModel", engine_pb2.SleepModelRequest(model="awake")),
        ("WakeModel", engine_pb2.WakeModelRequest(model="awake")),
    ):
        refused = await failure(getattr(stub, model)(message))
        assert refused.reason is Reason.MODEL_NOT_LOADED, model
        assert refused.metadata["state"] == "unloaded"
    assert (await engine.state("awake")).state == engine_pb2.MODEL_STATE_UNLOADED
    loaded = await stub.LoadModel(engine_pb2.LoadModelRequest(model="awake"))
    assert loaded.model.state == engine_pb2.MODEL_STATE_READY
    assert await num_tokens(stub.Generate(request("awake", "r3"))) == 8


async def test_a_model_with_requests_is_busy(engine: Engine) -> None:
    call = engine.stub.Generate(slow_request("awake", "r"))
    await call.read()
    assert (await engine.state("awake")).requests == 1
    sleep = engine.stub.SleepModel(engine_pb2.SleepModelRequest(model="awake"))
    assert (await failure(sleep)).reason is Reason.MODEL_BUSY
    call.cancel()


async def test_a_name_is_needed_to_change_a_model_and_known(engine: Engine) -> None:
    for method in ("LoadModel", "UnloadModel", "SleepModel", "WakeModel"):
        message = getattr(engine_pb2, f"{method}Request")
        unnamed = await failure(getattr(engine.stub, method)(message()))
        assert unnamed.field_violations[0][0] == "model"
        unknown = await failure(getattr(engine.stub, method)(message(model="other")))
        assert unknown.reason is Reason.MODEL_NOT_FOUND


async def test_a_deadline_holds_while_a_model_wakes(engine: Engine) -> None:
    call = engine.stub.Generate(request("asleep", "r"), timeout=0.05)
    assert (await failure(call)).reason is Reason.DEADLINE_EXCEEDED
    await asyncio.wait_for(engine.asleep.wake(), 60)
    assert await num_tokens(engine.stub.Generate(request("asleep", "r"))) == 8


async def test_generations_of_a_shared_stream_wait_for_their_model_and_for_no_other(
    engine: Engine,
) -> None:
    call = engine.stub.GenerateMany()
    await call.read()
    inputs = [
        engine_pb2.GenerationInput(session_id=number, open=engine_pb2.GenerationOpen(request=each))
        for number, each in enumerate(
            (
                request("asleep", "waits"),
                request("asleep", "leaves"),
                request("asleep", "expires"),
                request("awake", "goes on"),
                request(
                    "asleep",
                    "asks for too much",
                    stopping=types_pb2.StoppingCriteria(max_tokens=9999),
                ),
            )
        )
    ]
    inputs[2].open.timeout_ms = 30
    await call.write(engine_pb2.GenerateManyRequest(inputs=inputs))
    leave = engine_pb2.GenerationInput(session_id=1, cancel=True)
    await call.write(engine_pb2.GenerateManyRequest(inputs=[leave]))
    tokens: dict[int, int] = {}
    ends: list[int] = []
    errors: dict[int, Reason] = {}
    async with asyncio.timeout(60):
        while len(ends) < 4:
            for output in (await call.read()).outputs:
                added = sum(len(delta.token_ids) for delta in output.chunk.deltas)
                tokens[output.session_id] = tokens.get(output.session_id, 0) + added
                if output.finished:
                    ends.append(output.session_id)
                if output.HasField("error"):
                    error = from_session_status(output.error, peer="engine")
                    errors[output.session_id] = error.reason
    assert errors == {2: Reason.DEADLINE_EXCEEDED, 4: Reason.PROMPT_TOO_LONG}
    assert (tokens[0], tokens[3]) == (8, 8)
    assert ends.index(3) < ends.index(0)
    assert 1 not in ends
    call.cancel()


async def test_metrics_tell_where_the_models_are(engine: Engine) -> None:
    def value(name: str, **labels: str) -> float | None:
        found: float | None = engine.metrics.registry.get_sample_value(name, labels)
        return found

    def states(model: str) -> set[str]:
        name = "meshserve_engine_model_state"
        return {each.value for each in State if value(name, model=model, state=each.value)}

    assert (states("awake"), states("asleep")) == ({"ready"}, {"sleeping"})
    memory = "meshserve_process_resident_memory_bytes"
    assert value(memory, process="core awake")
    assert value(memory, process="core asleep") is None
    await engine.stub.WakeModel(engine_pb2.WakeModelRequest(model="asleep"))
    assert states("asleep") == {"ready"}
    assert value(memory, process="core asleep")


async def test_the_load_of_an_engine_is_that_of_all_its_models(engine: Engine) -> None:
    await engine.stub.WakeModel(engine_pb2.WakeModelRequest(model="asleep"))
    calls = [engine.stub.Generate(slow_request(name, name)) for name in ("awake", "asleep")]
    for call in calls:
        await call.read()
    watch = engine.stub.WatchLoad(engine_pb2.WatchLoadRequest(interval_ms=10))
    async with asyncio.timeout(10):
        while (await watch.read()).running_sequences != 2:
            pass
    aborted = await engine.stub.Abort(engine_pb2.AbortRequest(request_id="asleep"))
    assert aborted.aborted
    assert (await failure_at_the_end(calls[1])).reason is Reason.ABORTED
    calls[0].cancel()
    watch.cancel()


async def failure_at_the_end(call: Any) -> ServiceError:
    async def read() -> None:
        while await call.read() is not grpc.aio.EOF:
            pass

    with pytest.raises(grpc.RpcError) as raised:
        await read()
    return ServiceError.from_rpc_error(raised.value, peer="engine")
