"""Adapters that operators load: there on every engine, and asked for by name."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from hashlib import sha256
from pathlib import Path
from typing import Any

import grpc
import pytest

from meshserve.v1 import admin_pb2, gateway_pb2
from services.gateway.hosting import reconciler
from tests.fakes.hosting_mesh import OWN, HostingMesh
from tests.fakes.scripted_mesh import MODEL
from tests.support.errors import Failure, failure_of
from tests.support.waiting import until


@pytest.fixture
async def mesh(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[HostingMesh]:
    monkeypatch.setattr(reconciler, "INTERVAL_S", 0.02)
    monkeypatch.setattr(reconciler, "FIRST_RETRY_S", 0.05)
    async with HostingMesh(tmp_path) as started:
        await until(lambda: len(started.gateway._hosting.watch(MODEL).reports) == 2)
        await until(lambda: OWN in started.gateway._hosting.adapters)
        yield started


async def load(
    mesh: HostingMesh, name: str = "legal", source: str = "/a"
) -> admin_pb2.HostedAdapter:
    request = admin_pb2.AdminServiceLoadAdapterRequest(adapter=name, source=source)
    return (await mesh.admin.LoadAdapter(request, timeout=20)).adapter


async def unload(mesh: HostingMesh, name: str) -> Any:
    request = admin_pb2.AdminServiceUnloadAdapterRequest(adapter=name)
    return (await mesh.admin.UnloadAdapter(request, timeout=20)).replicas


async def refusal(call: Any) -> Failure:
    with pytest.raises(grpc.RpcError) as error:
        await call
    return failure_of(error.value)


async def test_an_adapter_is_loaded_everywhere_and_answers_to_its_name(mesh: HostingMesh) -> None:
    adapter = await load(mesh)
    assert [(each.loaded, each.size_bytes) for each in adapter.replicas] == [(True, 7)] * 2
    assert adapter.source == "/a"
    revision = f"legal@{adapter.revision}"
    for model, name in (("", "legal"), ("legal", ""), (f"{MODEL}:legal", ""), ("alias", "legal")):
        assert await mesh.answer(model, name) == revision
    assert await mesh.answer() == await mesh.answer(MODEL) == "base"
    assert await mesh.answer(OWN) == OWN


async def test_an_answer_names_its_adapter_and_its_model(mesh: HostingMesh) -> None:
    await load(mesh)
    answer = await mesh.generate(model="legal")
    assert (answer.model, answer.adapter) == (MODEL, "legal")
    first, *_ = await mesh.stream(model="legal")
    assert (first.started.model, first.started.adapter) == (MODEL, "legal")
    chat = gateway_pb2.ChatRequest(model="legal")
    chat.conversation.messages.add(role="ROLE_USER", content="hello")
    assert (await mesh.stub.Chat(chat, timeout=20)).adapter == "legal"
    model = (await mesh.stub.GetModel(gateway_pb2.GetModelRequest(model="legal"))).model
    assert (model.name, list(model.adapters)) == (MODEL, ["legal", OWN])


async def test_an_engine_that_starts_anew_is_given_what_it_had(mesh: HostingMesh) -> None:
    adapter = await load(mesh)
    mesh.engines[0].start_anew()
    await until(lambda: f"legal@{adapter.revision}" in mesh.engines[0].adapters)
    assert mesh.engines[0].asked == [f"load legal@{adapter.revision}"]


async def test_only_engines_that_have_an_adapter_are_asked_for_it(mesh: HostingMesh) -> None:
    mesh.engines[0].fails = True
    adapter = await load(mesh)
    assert [(each.loaded, each.reason) for each in adapter.replicas].count((True, "")) == 1
    assert [each.problem for each in adapter.replicas if not each.loaded] == ["no room"]
    answers = await asyncio.gather(*(mesh.answer("legal") for _ in range(8)))
    assert set(answers) == {f"legal@{adapter.revision}"}
    assert [len(engine.requests) for engine in mesh.engines] == [0, 8]
    mesh.engines[0].fails = False
    await until(lambda: mesh.engines[0].adapters == mesh.engines[1].adapters)


async def test_nothing_is_kept_of_an_adapter_that_no_engine_can_load(mesh: HostingMesh) -> None:
    failure = await refusal(load(mesh, source="/broken"))
    assert (failure.reason, failure.fields) == ("INVALID_FIELD", ("source",))
    asked = [list(engine.asked) for engine in mesh.engines]
    await asyncio.sleep(0.2)
    assert [engine.asked for engine in mesh.engines] == asked
    failure = await refusal(mesh.generate(model="legal"))
    assert failure.reason == "MODEL_NOT_FOUND"


async def test_what_is_loaded_anew_takes_over_and_what_was_there_goes(
    mesh: HostingMesh, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = await load(mesh)
    for engine in mesh.engines:
        engine.may_load.clear()
    loading = asyncio.create_task(load(mesh, source="/b"))
    await until(lambda: all(len(engine.asked) == 2 for engine in mesh.engines))
    assert await mesh.answer("legal") == f"legal@{first.revision}"
    for engine in mesh.engines:
        engine.may_load.set()
    second = await loading
    assert await mesh.answer("legal") == f"legal@{second.revision}"
    assert all(f"legal@{first.revision}" in engine.adapters for engine in mesh.engines)
    monkeypatch.setattr(reconciler, "STRAY_GRACE_S", 0.05)
    await until(
        lambda: all(engine.adapters == [f"legal@{second.revision}", OWN] for engine in mesh.engines)
    )


async def test_an_unloaded_adapter_is_gone_everywhere(mesh: HostingMesh) -> None:
    await load(mesh)
    assert [each.loaded for each in await unload(mesh, "legal")] == [False, False]
    assert [engine.adapters for engine in mesh.engines] == [[OWN]] * 2
    failure = await refusal(mesh.generate(adapter="legal"))
    assert (failure.code, failure.reason) == (grpc.StatusCode.NOT_FOUND, "ADAPTER_NOT_FOUND")
    assert (await refusal(unload(mesh, "legal"))).reason == "ADAPTER_NOT_FOUND"


async def test_unknown_names_are_told_the_nearest(mesh: HostingMesh) -> None:
    await load(mesh)
    failure = await refusal(mesh.generate(adapter="legl", model=MODEL))
    assert (failure.reason, failure.metadata["nearest"]) == ("ADAPTER_NOT_FOUND", "legal")
    failure = await refusal(mesh.generate(model=f"{MODEL}:legl"))
    assert (failure.reason, failure.metadata["nearest"]) == ("ADAPTER_NOT_FOUND", "legal")
    failure = await refusal(mesh.generate(model="legl"))
    assert (failure.reason, failure.metadata["nearest"]) == ("MODEL_NOT_FOUND", "legal")
    failure = await refusal(mesh.generate(model="legal", adapter=OWN))
    assert (failure.reason, failure.fields) == ("INVALID_FIELD", ("adapter",))


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        (MODEL, "ADAPTER_NAME_TAKEN"),
        ("alias", "ADAPTER_NAME_TAKEN"),
        (OWN, "ADAPTER_NAME_TAKEN"),
        ("", "INVALID_FIELD"),
        ("with:mark", "INVALID_FIELD"),
        ("legal@1", "INVALID_FIELD"),
        ("x" * 129, "INVALID_FIELD"),
    ],
)
async def test_names_that_would_mean_something_else_are_refused(
    mesh: HostingMesh, name: str, reason: str
) -> None:
    assert (await refusal(load(mesh, name))).reason == reason
    assert [engine.asked for engine in mesh.engines] == [[], []]


async def test_what_the_settings_declare_stays(mesh: HostingMesh) -> None:
    assert (await refusal(unload(mesh, OWN))).reason == "ADAPTER_NAME_TAKEN"
    assert [engine.adapters for engine in mesh.engines] == [[OWN]] * 2


async def test_an_adapter_that_no_engine_has_now_is_being_loaded(mesh: HostingMesh) -> None:
    await load(mesh)
    for engine in mesh.engines:
        engine.may_load.clear()
        engine.start_anew()
    await until(lambda: all(engine.asked for engine in mesh.engines))
    failure = await refusal(mesh.generate(model="legal"))
    assert (failure.reason, failure.retry_after_s) == ("MODEL_LOADING", 1)
    for engine in mesh.engines:
        engine.may_load.set()
    await until(lambda: all(len(engine.adapters) == 2 for engine in mesh.engines))


async def test_the_deadline_of_an_operator_is_the_engines(mesh: HostingMesh) -> None:
    for engine in mesh.engines:
        engine.may_load.clear()
    request = admin_pb2.AdminServiceLoadAdapterRequest(adapter="legal", source="/a")
    with pytest.raises(grpc.RpcError) as error:
        await mesh.admin.LoadAdapter(request, timeout=0.3)
    assert error.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED
    for engine in mesh.engines:
        engine.may_load.set()
    assert (await load(mesh)).replicas[0].loaded, "nobody is at it any more"


async def test_a_list_tells_where_adapters_are(mesh: HostingMesh) -> None:
    await load(mesh)
    listed = await mesh.admin.ListAdapters(admin_pb2.AdminServiceListAdaptersRequest())
    assert [(each.adapter, each.source) for each in listed.adapters] == [("legal", "/a"), (OWN, "")]
    assert all(replica.loaded for each in listed.adapters for replica in each.replicas)


async def test_a_kept_answer_of_what_had_the_name_before_is_not_served(tmp_path: Path) -> None:
    async with HostingMesh(tmp_path, cache={"enabled": True}) as mesh:
        await until(lambda: OWN in mesh.gateway._hosting.adapters)
        texts, cached = [], []
        for source in ("/a", "/b"):
            await load(mesh, source=source)
            for _ in range(2):
                answer = await mesh.generate(model="legal", temperature=0)
                texts.append(answer.choices[0].text)
                cached.append(answer.cached)
                await until(lambda: not mesh.cache.leases)
        assert cached == [False, True, False, True]
        assert texts[0] == texts[1] != texts[2] == texts[3]
        assert not (await mesh.generate(temperature=0)).cached, "the model itself is another again"


async def test_keys_may_name_adapters(tmp_path: Path) -> None:
    digest = {name: sha256(name.encode()).hexdigest() for name in "abc"}
    keys = [
        {"name": "ops", "sha256": digest["a"], "operator": True},
        {"name": "one", "sha256": digest["b"], "models": [f"{MODEL}:legal"]},
        {"name": "all", "sha256": digest["c"], "models": ["alias"]},
    ]
    gateway = {"http_listen": None, "auth": {"mode": "required", "keys": keys}}
    async with HostingMesh(tmp_path, gateway=gateway) as mesh:
        await until(lambda: OWN in mesh.gateway._hosting.adapters)
        request = admin_pb2.AdminServiceLoadAdapterRequest(adapter="legal", source="/a")

        def key(name: str) -> Any:
            return [("authorization", f"Bearer {name}")]

        refused = await refusal(mesh.admin.LoadAdapter(request, metadata=key("b")))
        assert (refused.code, refused.reason) == (
            grpc.StatusCode.PERMISSION_DENIED,
            "NOT_AN_OPERATOR",
        )
        await mesh.admin.LoadAdapter(request, metadata=key("a"))

        async def asked(name: str, model: str) -> str:
            generation = gateway_pb2.GenerateRequest(text="hello", model=model)
            try:
                await mesh.stub.Generate(generation, metadata=key(name))
            except grpc.aio.AioRpcError as error:
                return failure_of(error).reason
            return ""

        assert await asked("b", "legal") == ""
        assert await asked("b", MODEL) == await asked("b", OWN) == "MODEL_NOT_ALLOWED"
        assert await asked("c", "legal") == await asked("c", MODEL) == ""
        listed = await mesh.stub.ListModels(gateway_pb2.ListModelsRequest(), metadata=key("b"))
        assert [list(each.adapters) for each in listed.models] == [["legal"]]
