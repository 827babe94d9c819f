"""`meshserve models load` and its like, and `meshserve adapters`."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import grpc
import pytest

from meshserve.v1 import admin_pb2, engine_pb2
from services.runtime.errors import Reason, ServiceError, status_metadata
from tests.fakes.scripted_gateway import ScriptedGateway


def hosted(problem: str = "") -> admin_pb2.HostedModel:
    ready = engine_pb2.MODEL_STATE_READY
    replicas = [
        admin_pb2.ModelReplica(address="10.0.0.1:1", state=ready, memory_bytes=3 * 2**20),
        admin_pb2.ModelReplica(address="10.0.0.2:1", problem=problem),
    ]
    return admin_pb2.HostedModel(model="small", state=ready, replicas=replicas)


@pytest.mark.parametrize("action", ["load", "unload", "sleep", "wake"])
def test_what_became_of_a_model_is_told_engine_by_engine(
    gateway: ScriptedGateway, meshserve: Callable, action: str
) -> None:
    kind = action.capitalize()
    response = getattr(admin_pb2, f"AdminService{kind}ModelResponse")
    gateway.answer(f"admin.{kind}Model", response(model=hosted()))
    result = meshserve("models", action, "small", "--target", gateway.target)
    assert result.code == 0
    assert result.out.splitlines() == ["10.0.0.1:1  ready    3 MiB", "10.0.0.2:1  unknown"]
    assert gateway.requests[0].model == "small"
    gateway.answer(f"admin.{kind}Model", response(model=hosted("no room")))
    result = meshserve("models", action, "small", "--target", gateway.target)
    assert result.code == 1
    assert "no room" in result.out
    result = meshserve("models", action, "small", "--json", "--target", gateway.target)
    assert json.loads(result.out)["replicas"][1]["problem"] == "no room"


def test_adapters_are_loaded_listed_and_unloaded(
    gateway: ScriptedGateway, meshserve: Callable
) -> None:
    replicas = [
        admin_pb2.AdapterReplica(address="10.0.0.1:1", loaded=True, size_bytes=2**20),
        admin_pb2.AdapterReplica(address="10.0.0.2:1", problem="no such file"),
    ]
    adapter = admin_pb2.HostedAdapter(
        adapter="legal", model="small", source="/a", replicas=replicas
    )
    own = admin_pb2.HostedAdapter(adapter="own", model="small", replicas=replicas[:1])
    gateway.answer("admin.LoadAdapter", admin_pb2.AdminServiceLoadAdapterResponse(adapter=adapter))
    gateway.answer(
        "admin.ListAdapters", admin_pb2.AdminServiceListAdaptersResponse(adapters=[adapter, own])
    )
    gateway.answer(
        "admin.UnloadAdapter", admin_pb2.AdminServiceUnloadAdapterResponse(replicas=replicas[:1])
    )
    result = meshserve("adapters", "load", "legal", "/a", "-m", "small", "--target", gateway.target)
    assert result.code == 1, "one engine failed"
    assert result.out.splitlines() == [
        "10.0.0.1:1  loaded      1 MiB",
        "10.0.0.2:1  not loaded         no such file",
    ]
    assert gateway.requests[0].source == "/a"
    result = meshserve("adapters", "list", "--target", gateway.target)
    assert result.out.splitlines() == [
        "legal  small  on 1 of 2  /a                        10.0.0.2:1: no such file",
        "own    small  on 1 of 1  declared in the settings",
    ]
    result = meshserve("adapters", "unload", "legal", "--target", gateway.target)
    assert (result.code, result.out) == (0, "10.0.0.1:1  loaded  1 MiB\n")
    result = meshserve("adapters", "list", "--json", "--target", gateway.target)
    assert [each["name"] for each in json.loads(result.out)] == ["legal", "own"]


@pytest.mark.parametrize(
    ("reason", "way_out"),
    [
        (Reason.MODEL_NOT_LOADED, "`meshserve models load`"),
        (Reason.ADAPTER_NOT_FOUND, "`meshserve adapters list`"),
    ],
)
def test_what_is_not_there_is_said_with_the_way_out(
    gateway: ScriptedGateway, meshserve: Callable, reason: Reason, way_out: str
) -> None:
    def refuse(request: Any, context: grpc.ServicerContext) -> Any:
        error = ServiceError(reason, "it is not there")
        context.set_trailing_metadata(status_metadata(error))
        context.abort(error.code, error.message)

    gateway.on("StreamChat", refuse)
    result = meshserve("chat", "--adapter", "legal", "hi", "--target", gateway.target)
    assert "error: it is not there" in result.err
    assert way_out in result.err
