"""Models that operators load, unload, put to sleep and wake, on every engine."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import grpc
import pytest

from meshserve.v1 import admin_pb2, engine_pb2, gateway_pb2
from services.gateway.hosting import reconciler
from tests.fakes.hosting_mesh import FAILED, OWN, READY, SLEEPING, UNLOADED, HostingMesh
from tests.fakes.scripted_mesh import MODEL
from tests.support.errors import Failure, failure_of
from tests.support.waiting import until


@pytest.fixture
async def mesh(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[HostingMesh]:
    monkeypatch.setattr(reconciler, "INTERVAL_S", 0.02)
    monkeypatch.setattr(reconciler, "FIRST_RETRY_S", 0.05)
    async with HostingMesh(tmp_path) as started:
        await until(lambda: OWN in started.gateway._hosting.adapters)
        await until(lambda: len(started.gateway._hosting.placement(MODEL).ready) == 2)
        yield started


def states(model: admin_pb2.HostedModel) -> list[int]:
    return [replica.state for replica in model.replicas]


async def ask(mesh: HostingMesh, kind: str, **fields: Any) -> Any:
    request = getattr(admin_pb2, f"AdminService{kind}Request")(model=MODEL, **fields)
    return await getattr(mesh.admin, kind)(request, timeout=20)


async def refusal(call: Any) -> Failure:
    with pytest.raises(grpc.RpcError) as error:
        await call
    return failure_of(error.value)


async def test_an_unloaded_model_refuses_requests_and_a_loaded_one_takes_them(
    mesh: HostingMesh,
) -> None:
    unloaded = await ask(mesh, "UnloadModel")
    assert (states(unloaded.model), unloaded.aborted_requests) == ([UNLOADED] * 2, 2)
    assert unloaded.model.intent == admin_pb2.MODEL_INTENT_UNLOADED
    failure = await refusal(mesh.generate())
    assert (failure.code, failure.reason) == (
        grpc.StatusCode.FAILED_PRECONDITION,
        "MODEL_NOT_LOADED",
    )
    assert failure.metadata["state"] == "unloaded"
    shown = (await mesh.stub.GetModel(gateway_pb2.GetModelRequest())).model
    assert (shown.state, shown.ready) == (UNLOADED, False)
    loaded = await ask(mesh, "LoadModel")
    assert (states(loaded.model), loaded.model.state) == ([READY] * 2, READY)
    assert await mesh.answer() == "base"


async def test_an_engine_that_starts_later_has_what_operators_want(mesh: HostingMesh) -> None:
    await ask(mesh, "UnloadModel")
    mesh.engines[1].start_anew()
    await until(lambda: mesh.engines[1].models[MODEL].state == UNLOADED)
    await ask(mesh, "LoadModel")
    mesh.engines[0].start_anew()
    mesh.engines[0].models[MODEL].state = UNLOADED
    await until(lambda: mesh.engines[0].models[MODEL].state == READY)


async def test_what_one_engine_cannot_load_the_others_answer(mesh: HostingMesh) -> None:
    await ask(mesh, "UnloadModel")
    mesh.engines[0].fails = True
    loaded = await ask(mesh, "LoadModel")
    assert sorted(states(loaded.model)) == [UNLOADED, READY]
    assert [each.problem for each in loaded.model.replicas if each.problem] == ["no room"]
    answers = await asyncio.gather(*(mesh.answer() for _ in range(6)))
    assert answers == ["base"] * 6
    mesh.engines[0].fails = False
    await until(lambda: mesh.engines[0].models[MODEL].state == READY)


async def test_a_load_that_fails_everywhere_is_the_operators_error(mesh: HostingMesh) -> None:
    await ask(mesh, "UnloadModel")
    for engine in mesh.engines:
        engine.fails = True
    assert (await refusal(ask(mesh, "LoadModel"))).message == "no room"
    asked = [len(engine.asked) for engine in mesh.engines]
    await asyncio.sleep(0.2)
    assert [len(engine.asked) for engine in mesh.engines] == asked, "nothing is kept of it"


async def test_a_model_that_could_not_be_loaded_says_so(mesh: HostingMesh) -> None:
    for engine in mesh.engines:
        engine.models[MODEL].state = FAILED
        engine.models[MODEL].problem = "no weights"
    hosting = mesh.gateway._hosting
    await until(lambda: hosting.state(MODEL) == FAILED)
    failure = await refusal(mesh.generate())
    assert (failure.reason, failure.metadata["state"]) == ("MODEL_NOT_LOADED", "failed")
    listed = await mesh.admin.ListModels(admin_pb2.AdminServiceListModelsRequest())
    assert [each.problem for each in listed.models[0].replicas] == ["no weights"] * 2


async def test_a_sleeping_model_is_woken_by_a_request_or_by_an_operator(mesh: HostingMesh) -> None:
    asleep = await ask(mesh, "SleepModel")
    assert (states(asleep.model), asleep.freed_bytes) == ([SLEEPING] * 2, 2000)
    assert (await mesh.stub.GetModel(gateway_pb2.GetModelRequest())).model.ready
    assert await mesh.answer() == "base"
    assert sorted(engine.models[MODEL].state for engine in mesh.engines) == [READY, SLEEPING]
    awake = await ask(mesh, "WakeModel")
    assert states(awake.model) == [READY] * 2


async def test_what_is_no_model_cannot_be_acted_on(mesh: HostingMesh) -> None:
    request = admin_pb2.AdminServiceSleepModelRequest(model=OWN)
    assert (await refusal(mesh.admin.SleepModel(request))).fields == ("model",)
    request = admin_pb2.AdminServiceSleepModelRequest(model="scriptd")
    assert (await refusal(mesh.admin.SleepModel(request))).metadata["nearest"] == MODEL
    request = admin_pb2.AdminServiceSleepModelRequest()
    assert (await refusal(mesh.admin.SleepModel(request))).fields == ("model",)


async def test_a_model_that_only_requests_load_is_loaded_by_the_first(tmp_path: Path) -> None:
    mesh = HostingMesh(tmp_path)
    described = [engine.GetModelInfo for engine in mesh.engines]
    for engine, describe in zip(mesh.engines, described, strict=True):
        engine.models[MODEL].state = SLEEPING

        async def info(
            request: Any, context: Any, engine: Any = engine, say: Any = describe
        ) -> Any:
            if engine.models[MODEL].state == SLEEPING:
                await context.abort(grpc.StatusCode.FAILED_PRECONDITION, "never been in memory")
            return await say(request, context)

        engine.GetModelInfo = info  # type: ignore[method-assign]
    async with mesh:
        await until(lambda: mesh.gateway._models.complete)
        answers = await asyncio.gather(*(mesh.answer() for _ in range(4)))
        assert answers == ["base"] * 4
        asked = [each for engine in mesh.engines for each in engine.asked]
        assert asked == [f"wake {MODEL}"], "by one, for all that wait"


async def test_engines_that_do_not_tell_are_taken_as_they_were(tmp_path: Path) -> None:
    mesh = HostingMesh(tmp_path)
    for engine in mesh.engines:

        async def unknown(request: Any, context: Any) -> Any:
            await context.abort(grpc.StatusCode.UNIMPLEMENTED, "what is that?")

        engine.ListModels = unknown  # type: ignore[method-assign]
    async with mesh:
        hosting = mesh.gateway._hosting
        await until(lambda: len(hosting.watch(MODEL).reports) == 2)
        assert await mesh.answer() == "base"
        assert hosting.state(MODEL) == engine_pb2.MODEL_STATE_UNSPECIFIED


async def test_a_request_that_names_no_model_does_not_wake_one_that_nobody_knows(
    tmp_path: Path,
) -> None:
    models = {name: {"source": name} for name in ("unknown", MODEL)}
    mesh = HostingMesh(tmp_path, models=models)
    for engine in mesh.engines:
        describe = engine.GetModelInfo
        asleep = engine_pb2.EngineModel(name="unknown", state=SLEEPING)
        engine.models["unknown"] = asleep

        async def info(request: Any, context: Any, say: Any = describe) -> Any:
            if request.model == "unknown":
                await context.abort(grpc.StatusCode.FAILED_PRECONDITION, "never been in memory")
            return await say(request, context)

        engine.GetModelInfo = info  # type: ignore[method-assign]
    async with mesh:
        await until(lambda: mesh.gateway._models.complete)
        assert (await mesh.generate()).model == MODEL
        assert all(not engine.asked for engine in mesh.engines)


async def test_what_an_engine_said_that_is_away_is_not_what_the_model_does(
    mesh: HostingMesh,
) -> None:
    await mesh.kill_engine(1)
    hosting = mesh.gateway._hosting
    await until(lambda: any(report.problem for report in hosting.watch(MODEL).reports.values()))
    assert (await ask(mesh, "SleepModel")).model.state == SLEEPING
    await mesh.kill_engine(0)
    await until(lambda: all(report.problem for report in hosting.watch(MODEL).reports.values()))
    failure = await refusal(mesh.generate(model=OWN))
    assert failure.reason == "SERVICE_UNAVAILABLE", "it is still known whose adapter that is"
