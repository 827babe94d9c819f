"""What operators ask through the clients, and what they are told."""

from __future__ import annotations

from datetime import UTC, datetime

import pytest

import meshserve
from meshserve import AdapterReplica, HostedAdapter, HostedModel, ModelReplica
from meshserve.v1 import admin_pb2, engine_pb2, gateway_pb2
from tests.fakes.scripted_gateway import ScriptedGateway

MODEL = admin_pb2.HostedModel(
    model="small",
    state=engine_pb2.MODEL_STATE_READY,
    intent=admin_pb2.MODEL_INTENT_LOADED,
    replicas=[
        admin_pb2.ModelReplica(
            address="10.0.0.1:1", state=engine_pb2.MODEL_STATE_READY, memory_bytes=7, requests=2
        ),
        admin_pb2.ModelReplica(address="10.0.0.2:1", problem="no room", reason="INTERNAL"),
    ],
)
ADAPTER = admin_pb2.HostedAdapter(
    adapter="legal",
    model="small",
    source="/a",
    revision="1f",
    load_time={"seconds": 60},
    replicas=[admin_pb2.AdapterReplica(address="10.0.0.1:1", loaded=True, size_bytes=5)],
)
SEEN_MODEL = HostedModel(
    "small",
    "ready",
    "loaded",
    (
        ModelReplica("10.0.0.1:1", "ready", memory_bytes=7, requests=2),
        ModelReplica("10.0.0.2:1", problem="no room", reason="INTERNAL"),
    ),
)
SEEN_ADAPTER = HostedAdapter(
    "legal",
    "small",
    "/a",
    "1f",
    datetime(1970, 1, 1, 0, 1, tzinfo=UTC),
    (AdapterReplica("10.0.0.1:1", loaded=True, size_bytes=5),),
)


def script(gateway: ScriptedGateway) -> None:
    gateway.answer("admin.ListModels", admin_pb2.AdminServiceListModelsResponse(models=[MODEL]))
    for kind in ("Load", "Unload", "Sleep", "Wake"):
        response = getattr(admin_pb2, f"AdminService{kind}ModelResponse")
        gateway.answer(f"admin.{kind}Model", response(model=MODEL))
    gateway.answer(
        "admin.ListAdapters", admin_pb2.AdminServiceListAdaptersResponse(adapters=[ADAPTER])
    )
    gateway.answer("admin.LoadAdapter", admin_pb2.AdminServiceLoadAdapterResponse(adapter=ADAPTER))
    gateway.answer(
        "admin.UnloadAdapter",
        admin_pb2.AdminServiceUnloadAdapterResponse(replicas=ADAPTER.replicas),
    )


def test_an_operator_is_told_what_became_of_it(gateway: ScriptedGateway) -> None:
    script(gateway)
    with meshserve.Client(gateway.target, api_key="ops") as client:
        assert client.admin.models() == [SEEN_MODEL]
        assert SEEN_MODEL.problems == ("10.0.0.2:1: no room",)
        for act in (client.admin.load_model, client.admin.sleep_model, client.admin.wake_model):
            assert act("small") == SEEN_MODEL
        assert client.admin.unload_model("small", drain_timeout_ms=5) == SEEN_MODEL
        assert gateway.requests[-1].timeout_ms == 5
        assert client.admin.adapters() == [SEEN_ADAPTER]
        assert client.admin.load_adapter("legal", "/a", model="small", timeout=9) == SEEN_ADAPTER
        request = gateway.requests[-1]
        assert (request.adapter, request.source, request.model) == ("legal", "/a", "small")
        assert 8 < (gateway.time_remaining[-1] or 0) < 9.5
        assert client.admin.unload_adapter("legal") == [*SEEN_ADAPTER.replicas]
    assert all(each["authorization"] == "Bearer ops" for each in gateway.metadata)


async def test_it_is_the_same_from_asyncio(gateway: ScriptedGateway) -> None:
    script(gateway)
    async with meshserve.AsyncClient(gateway.target) as client:
        assert await client.admin.models() == [SEEN_MODEL]
        for act in (client.admin.load_model, client.admin.unload_model, client.admin.wake_model):
            assert await act("small") == SEEN_MODEL
        assert await client.admin.sleep_model("small") == SEEN_MODEL
        assert await client.admin.load_adapter("legal", "/a") == SEEN_ADAPTER
        assert await client.admin.adapters("small") == [SEEN_ADAPTER]
        assert await client.admin.unload_adapter("legal") == [*SEEN_ADAPTER.replicas]


def test_an_answer_names_the_adapter_that_gave_it(gateway: ScriptedGateway) -> None:
    answer = gateway_pb2.GenerateResponse(model="small", adapter="legal")
    answer.choices.add(text="x", finish_reason="FINISH_REASON_STOP")
    gateway.answer("Generate", answer)
    model = gateway_pb2.Model(
        name="small", state=engine_pb2.MODEL_STATE_SLEEPING, adapters=["legal"]
    )
    gateway.answer("GetModel", gateway_pb2.GetModelResponse(model=model))
    response = gateway_pb2.StreamGenerateResponse
    stream = [
        response(started={"model": "small", "adapter": "legal"}),
        response(complete={"finish_reason": "FINISH_REASON_STOP"}),
    ]
    gateway.on("StreamGenerate", lambda request, context: iter(stream))
    with meshserve.Client(gateway.target) as client:
        assert client.generate("x", model="legal").adapter == "legal"
        with client.stream_generate("x", adapter="legal") as streamed:
            assert streamed.collect().adapter == "legal"
        seen = client.model("small")
        assert (seen.state, seen.adapters) == ("sleeping", ("legal",))


def test_what_is_no_text_never_leaves(gateway: ScriptedGateway) -> None:
    with (
        meshserve.Client(gateway.target) as client,
        pytest.raises(meshserve.InvalidRequestError, match="must be text"),
    ):
        client.admin.load_adapter(3, "/a")  # type: ignore[arg-type]
