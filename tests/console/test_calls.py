"""What the console's pages are told: who asks, what is served, what was asked of late."""

from __future__ import annotations

import asyncio
import base64
import hashlib
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import aiohttp

from tests.console.streams import chat_body, events_of
from tests.fakes.scripted_mesh import EngineRequest, EngineResponse, Script, ScriptedMesh, chunk
from tests.support.ports import free_ports

SECRET = "what nobody else may read"


async def chat(http: aiohttp.ClientSession, text: str = "hello", **options: Any) -> list[Any]:
    """The events of an answer."""
    async with http.post("/api/chat", json=chat_body(text), **options) as response:
        return [event async for event in events_of(response)]


async def recent(http: aiohttp.ClientSession, **options: Any) -> dict[str, Any]:
    """What a page is told of the requests of the one gateway when it opens."""
    async with http.get("/api/requests", **options) as response:
        _, document = await anext(events_of(response))
        (gateway,) = document["gateways"]
        return gateway


async def test_a_page_knows_who_asks_and_what_is_served(http: aiohttp.ClientSession) -> None:
    async with http.get("/api/session") as response:
        session = await response.json()
    assert (session["tenant"], session["operator"]) == ("anonymous", True)
    async with http.get("/api/models") as response:
        (model,) = (await response.json())["models"]
    assert model["name"] == "scripted"


# --- recent requests


async def test_a_request_is_told_of_by_counts_and_times_and_never_by_its_text(
    http: aiohttp.ClientSession,
) -> None:
    await chat(http, SECRET)
    async with http.get("/api/requests") as response:
        text = (await response.content.readuntil(b"\n\n")).decode()
    assert SECRET not in text
    assert "onetwo" not in text
    (request,) = (await recent(http))["finished"]
    assert (request["tenant"], request["model"], request["reason"]) == ("anonymous", "scripted", "")
    assert request["finish_reasons"] == ["FINISH_REASON_LENGTH"]
    assert request["usage"]["prompt_tokens"] > 0
    assert request["usage"]["completion_tokens"] > 0
    assert 0 < request["first_text_ms"] <= request["duration_ms"]
    stages = {stage["name"]: stage for stage in request["stages"]}
    assert {"authenticate", "admit", "route", "tokenize", "generate", "settle"} <= stages.keys()
    assert all(0 <= each["begin_ms"] <= each["end_ms"] for each in stages.values())
    assert stages["tokenize"]["end_ms"] <= stages["generate"]["begin_ms"]


async def test_a_failed_request_is_told_of_with_its_reason(http: aiohttp.ClientSession) -> None:
    body = chat_body(model="no such", request_id="mine")
    async with http.post("/api/chat", json=body) as response:
        assert response.status == 404
    (request,) = (await recent(http))["finished"]
    assert (request["request_id"], request["reason"]) == ("mine", "MODEL_NOT_FOUND")
    assert request["model"] == ""


async def test_requests_are_told_of_while_they_run_and_when_they_end(
    mesh: ScriptedMesh, http: aiohttp.ClientSession
) -> None:
    go_on = asyncio.Event()

    async def script(request: EngineRequest) -> AsyncIterator[EngineResponse]:
        yield chunk((0, b"text"))
        await go_on.wait()

    mesh.engine.script = script
    async with http.get("/api/requests") as watched:
        documents = events_of(watched)
        (gateway,) = (await anext(documents))[1]["gateways"]
        assert (gateway["finished"], gateway["in_flight"]) == ([], [])
        chatting = asyncio.create_task(chat(http))
        (running,) = (await anext(documents))[1]["gateways"]
        assert [each["in_flight"] for each in running["in_flight"]] == [True]
        go_on.set()
        await chatting
        async with asyncio.timeout(5):
            while not running["finished"]:
                (running,) = (await anext(documents))[1]["gateways"]
    assert running["in_flight"] == []
    # The engine ended without an end of the choice.
    assert running["finished"][0]["reason"] == "INTERNAL"


# --- others' business


def bearer(key: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {key}"}


@asynccontextmanager
async def guarded_gateway(
    folder: Path, script: Script | None = None
) -> AsyncIterator[aiohttp.ClientSession]:
    """A gateway with two tenants and an operator, whose names are their keys."""
    (port,) = free_ports(1)
    keys = [
        {
            "name": name,
            "sha256": hashlib.sha256(name.encode()).hexdigest(),
            "operator": name == "ops",
        }
        for name in ("acme", "other", "ops")
    ]
    gateway = {
        "http_listen": f"127.0.0.1:{port}",
        "auth": {"mode": "required", "keys": keys},
    }
    async with (
        ScriptedMesh(folder, gateway=gateway) as mesh,
        aiohttp.ClientSession(base_url=mesh.http_url) as http,
    ):
        mesh.engine.script = script or mesh.engine.script
        yield http


async def test_a_tenant_sees_its_own_requests_and_an_operator_all(tmp_path: Path) -> None:
    async with guarded_gateway(tmp_path) as http:
        for key in ("acme", "other"):
            await chat(http, headers=bearer(key))
        for key, tenants in (("acme", {"acme"}), ("other", {"other"}), ("ops", {"acme", "other"})):
            finished = (await recent(http, headers=bearer(key)))["finished"]
            assert {request["tenant"] for request in finished} == tenants


async def test_the_mesh_is_for_operators(tmp_path: Path) -> None:
    async with (
        guarded_gateway(tmp_path) as http,
        http.get("/api/mesh", headers=bearer("acme")) as response,
    ):
        assert response.status == 403
        assert (await response.json())["error"]["reason"] == "NOT_AN_OPERATOR"


# --- texts of tokens


async def test_log_probabilities_come_with_the_texts_of_their_tokens(
    http: aiohttp.ClientSession,
) -> None:
    body = chat_body(output={"logprobs": 0})
    async with http.post("/api/chat", json=body) as response:
        deltas = [
            delta
            async for _, document in events_of(response)
            for delta in document.get("chunk", {}).get("deltas", [])
        ]
    texts = [
        base64.b64decode(position["chosen"]["text"]).decode()
        for delta in deltas
        for position in delta["logprobs"]["positions"]
    ]
    assert texts == ["one", "two"]
