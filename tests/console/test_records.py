"""What is counted of calls by HTTP, and how many connections and watchers there may be."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack
from pathlib import Path

import aiohttp
import grpc
import pytest

from meshserve.v1 import mesh_pb2
from services.gateway.overview.servicer import MeshServicer
from services.runtime.errors import Reason, ServiceError
from tests.console.streams import chat_body, events_of
from tests.fakes.scripted_mesh import ScriptedMesh
from tests.support.ports import free_ports
from tests.support.waiting import until


def counted(mesh: ScriptedMesh, name: str, **labels: str) -> float:
    registry = mesh.gateway_metrics.registry
    return registry.get_sample_value(f"meshserve_http_server_{name}", labels) or 0.0


def calls(mesh: ScriptedMesh) -> dict[tuple[str, str, str], float]:
    """By method, route and status."""
    return {
        (sample.labels["method"], sample.labels["route"], sample.labels["status"]): sample.value
        for family in mesh.gateway_metrics.registry.collect()
        for sample in family.samples
        if sample.name == "meshserve_http_server_calls_total"
    }


async def test_calls_are_counted_by_pattern_method_and_status(
    mesh: ScriptedMesh, http: aiohttp.ClientSession
) -> None:
    async with http.get("/api/session") as response:
        assets = (await response.json())["assets"]
    for method, path in (
        ("GET", f"{assets}/app.js"),
        ("GET", "/assets/0123456789abcdef/app.js"),
        ("GET", "/made/up"),
        ("POST", "/api/models"),
        ("PROPFIND", "/api/models"),
    ):
        async with http.request(method, path):
            pass
    async with http.post("/api/chat", json={"nonsense": 1}):
        pass
    assert calls(mesh) == {
        ("GET", "/api/session", "200"): 1,
        ("GET", "/assets/{digest}/{name}", "200"): 1,
        ("GET", "/assets/{digest}/{name}", "404"): 1,
        ("GET", "other", "404"): 1,
        ("POST", "other", "405"): 1,
        ("other", "other", "405"): 1,
        ("POST", "/api/chat", "400"): 1,
    }
    labels = {"method": "GET", "route": "/api/session"}
    assert counted(mesh, "duration_seconds_count", **labels) == 1


async def test_event_streams_are_counted_while_they_are_open(
    mesh: ScriptedMesh, http: aiohttp.ClientSession
) -> None:
    route = "/api/requests"
    async with http.get(route) as response:
        await anext(events_of(response))
        assert counted(mesh, "event_streams", route=route) == 1
        assert counted(mesh, "active_calls", route=route) == 1
        assert counted(mesh, "connections") == 1
    await until(lambda: counted(mesh, "event_streams", route=route) == 0)
    assert counted(mesh, "active_calls", route=route) == 0
    # The reader left.
    await until(lambda: calls(mesh).get(("GET", route, "499")) == 1)
    async with http.post("/api/chat", json=chat_body()) as response:
        assert [event async for event, _ in events_of(response)][-1] == "done"
    await until(lambda: calls(mesh).get(("POST", "/api/chat", "200")) == 1)
    assert counted(mesh, "event_streams", route="/api/chat") == 0


@pytest.fixture
async def start(tmp_path: Path) -> AsyncIterator[Callable[..., object]]:
    """Starts a mesh whose gateway has settings of its own."""
    async with AsyncExitStack() as stack:

        async def started(**gateway: object) -> ScriptedMesh:
            (port,) = free_ports(1)
            section = {"http_listen": f"127.0.0.1:{port}", **gateway}
            return await stack.enter_async_context(ScriptedMesh(tmp_path, gateway=section))

        yield started


async def ask(port: int) -> tuple[int, dict[str, object], asyncio.StreamWriter]:
    """The status and the document of one call on a connection of its own, which stays open."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(b"GET /healthz HTTP/1.1\r\nHost: localhost\r\n\r\n")
    head = (await reader.readuntil(b"\r\n\r\n")).decode().lower()
    length = int(head.partition("content-length: ")[2].partition("\r\n")[0])
    return int(head.split()[1]), json.loads(await reader.readexactly(length)), writer


async def test_connections_beyond_the_limit_are_told_which_limit_it_is(
    start: Callable[..., object],
) -> None:
    mesh: ScriptedMesh = await start(max_http_connections=2)  # type: ignore[misc]
    port = int(mesh.http_url.rpartition(":")[2])
    (one, _, first), (two, _, second) = [await ask(port) for _ in range(2)]
    assert one == two == 200
    status, document, third = await ask(port)
    error = document["error"]
    assert isinstance(error, dict)
    assert (status, error["reason"], error["code"]) == (429, "LIMIT_REACHED", "RESOURCE_EXHAUSTED")
    assert error["metadata"] == {"limit": "gateway.max_http_connections"}
    assert "2 HTTP connections" in error["message"]
    assert counted(mesh, "refused_connections_total") == 1
    first.close()
    await until(lambda: counted(mesh, "connections") == 1)
    status, _, fourth = await ask(port)
    assert status == 200
    for writer in (second, third, fourth):
        writer.close()


async def test_who_is_refused_and_asks_nothing_is_let_go(
    start: Callable[..., object], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("services.gateway.http.connections.REQUEST_TIMEOUT_S", 0.05)
    mesh: ScriptedMesh = await start(max_http_connections=1)  # type: ignore[misc]
    port = int(mesh.http_url.rpartition(":")[2])
    _, _, first = await ask(port)
    reader, silent = await asyncio.open_connection("127.0.0.1", port)
    async with asyncio.timeout(2):
        assert await reader.read() == b""
    silent.close()
    first.close()


class Caller:
    """The context of a gRPC call without a key."""

    def invocation_metadata(self) -> tuple[tuple[str, str], ...]:
        return ()


async def watch(servicer: MeshServicer) -> mesh_pb2.WatchMeshResponse:
    responses = servicer.WatchMesh(mesh_pb2.WatchMeshRequest(), Caller())
    try:
        return await anext(responses)
    finally:
        await responses.aclose()


async def test_watchers_of_all_kinds_share_one_limit(start: Callable[..., object]) -> None:
    mesh: ScriptedMesh = await start(max_watchers=2)  # type: ignore[misc]
    servicer = mesh.gateway._mesh_servicer
    async with aiohttp.ClientSession(base_url=mesh.http_url) as http:
        assert (await watch(servicer)).mesh.services
        async with http.get("/api/requests") as first, http.get("/api/mesh") as second:
            assert first.status == second.status == 200
            for path in ("/api/requests", "/api/mesh"):
                async with http.get(path) as refused:
                    error = (await refused.json())["error"]
                assert (refused.status, error["reason"]) == (429, "LIMIT_REACHED")
                assert error["metadata"] == {"limit": "gateway.max_watchers"}
            with pytest.raises(ServiceError) as caught:
                await watch(servicer)
            assert caught.value.reason is Reason.LIMIT_REACHED
            assert caught.value.code is grpc.StatusCode.RESOURCE_EXHAUSTED
            # What is no watching goes on.
            async with http.get("/api/models") as response:
                assert response.status == 200
        watching = mesh.gateway_metrics.registry
        await until(lambda: watching.get_sample_value("meshserve_gateway_watchers") == 0)
        assert (await watch(servicer)).mesh.services
