"""What the HTTP listener does around every call: status, headers, deadline, and who may ask."""

from __future__ import annotations

import asyncio
import hashlib
import re
import ssl
import subprocess
from collections.abc import AsyncIterator
from pathlib import Path

import aiohttp
import pytest

from services.gateway.http.errors import http_status
from services.runtime.errors import Reason, ServiceError
from tests.console.streams import chat_body, events_of
from tests.fakes.scripted_mesh import (
    EngineRequest,
    EngineResponse,
    ScriptedMesh,
    chunk,
    complete,
)
from tests.support.ports import free_ports
from tests.support.waiting import until

KEY = "a key"


def digest(key: str) -> str:
    return hashlib.sha256(key.encode()).hexdigest()


async def text_of(response: aiohttp.ClientResponse) -> str:
    deltas = [
        delta
        async for event, document in events_of(response)
        for delta in document.get("chunk", {}).get("deltas", [])
    ]
    return "".join(delta.get("content", "") for delta in deltas)


# --- a chat


async def test_a_chat_is_streamed_and_says_that_it_is_done(http: aiohttp.ClientSession) -> None:
    async with http.post("/api/chat", json=chat_body()) as response:
        assert response.status == 200
        assert response.content_type == "text/event-stream"
        events = [event async for event in events_of(response)]
    assert [event for event, _ in events][-1] == "done"
    assert events[0][1]["started"]["model"] == "scripted"
    assert events[-2][1]["complete"]["finish_reason"] == "FINISH_REASON_LENGTH"
    assert {event for event, _ in events[:-1]} == {"message"}


async def test_a_request_that_is_refused_has_a_status_and_names_the_field(
    http: aiohttp.ClientSession,
) -> None:
    body = chat_body(sampling={"temperature": -1})
    async with http.post("/api/chat", json=body) as response:
        assert response.status == 400
        error = (await response.json())["error"]
    assert error["reason"] == "INVALID_FIELD"
    assert error["fields"][0]["field"] == "request.sampling.temperature"
    assert error["remedy"]


async def test_an_error_after_the_first_text_is_an_event_and_no_end(
    mesh: ScriptedMesh, http: aiohttp.ClientSession
) -> None:
    async def script(request: EngineRequest) -> AsyncIterator[EngineResponse]:
        yield chunk((0, b"text"))
        await asyncio.sleep(0.05)
        raise ServiceError(Reason.ENGINE_RESTARTED, "gone", retry_after_s=1.5)

    mesh.engine.script = script
    async with http.post("/api/chat", json=chat_body()) as response:
        assert response.status == 200
        events = [event async for event in events_of(response)]
    event, document = events[-1]
    assert (event, document["error"]["reason"]) == ("error", "ENGINE_RESTARTED")
    assert document["error"]["retry_after_s"] == 1.5


async def hanging(request: EngineRequest) -> AsyncIterator[EngineResponse]:
    yield chunk((0, b"text"))
    await asyncio.sleep(60)


async def test_a_browser_that_goes_away_frees_the_engine(
    mesh: ScriptedMesh, http: aiohttp.ClientSession
) -> None:
    mesh.engine.script = hanging
    async with http.post("/api/chat", json=chat_body()) as response:
        await anext(events_of(response))
        assert mesh.engine.active == 1
        response.close()
        await until(lambda: mesh.engine.left == 1)
    assert mesh.engine.active == 0


async def test_a_caller_may_set_the_deadline(
    mesh: ScriptedMesh, http: aiohttp.ClientSession
) -> None:
    mesh.engine.script = hanging
    headers = {"meshserve-timeout-s": "2"}
    async with http.post("/api/chat", json=chat_body(), headers=headers) as response:
        events = [event async for event in events_of(response)]
    assert events[-1][0] == "error"
    assert events[-1][1]["error"]["reason"] == "DEADLINE_EXCEEDED"
    await until(lambda: mesh.engine.left == 1)


@pytest.mark.parametrize("timeout", ["soon", "0", "-1", "nan", "1e9"])
async def test_a_deadline_that_is_none_is_refused(
    http: aiohttp.ClientSession, timeout: str
) -> None:
    headers = {"meshserve-timeout-s": timeout}
    async with http.get("/api/models", headers=headers) as response:
        assert response.status == 400


# --- errors


@pytest.mark.parametrize(
    ("method", "path", "status", "reason"),
    [
        ("GET", "/nothing", 404, "PATH_NOT_FOUND"),
        ("GET", "/assets/0000000000000000/app.js", 404, "PATH_NOT_FOUND"),
        ("GET", "/assets/../server.py", 404, "PATH_NOT_FOUND"),
        ("GET", "/api/chat", 405, "METHOD_NOT_ALLOWED"),
        ("POST", "/api/chat", 400, "MALFORMED_MESSAGE"),
    ],
)
async def test_errors_are_json_with_a_reason(
    http: aiohttp.ClientSession, method: str, path: str, status: int, reason: str
) -> None:
    async with http.request(method, path) as response:
        assert response.status == status
        assert (await response.json())["error"]["reason"] == reason


@pytest.mark.parametrize("body", ["{", '{"request": {"no_such": 1}}', "[" * 100_000, '"\xff"'])
async def test_a_body_that_is_no_message_is_refused(http: aiohttp.ClientSession, body: str) -> None:
    data = body.encode("latin-1")
    headers = {"content-type": "application/json"}
    async with http.post("/api/chat", data=data, headers=headers) as response:
        assert response.status == 400
        assert (await response.json())["error"]["reason"] == "MALFORMED_MESSAGE"


async def test_a_body_larger_than_a_prompt_may_be_is_refused(http: aiohttp.ClientSession) -> None:
    async with http.post("/api/chat", json=chat_body("a" * 10 * 2**20)) as response:
        assert response.status == 413
        assert (await response.json())["error"]["reason"] == "MESSAGE_TOO_LARGE"


def test_every_reason_has_a_status() -> None:
    statuses = {reason: http_status(reason) for reason in Reason}
    assert all(400 <= status < 600 for status in statuses.values())
    assert statuses[Reason.RATE_LIMITED] == 429
    assert statuses[Reason.SERVICE_UNAVAILABLE] == 503


# --- health


async def test_it_is_live_and_once_engines_are_reached_ready(
    http: aiohttp.ClientSession,
) -> None:
    for path in ("/healthz", "/readyz"):
        async with asyncio.timeout(5):
            while (await http.get(path)).status != 200:
                await asyncio.sleep(0.05)


async def test_it_is_not_ready_before_an_engine_was_reached(tmp_path: Path) -> None:
    port, nowhere = free_ports(2)
    sections = {
        "gateway": {"http_listen": f"127.0.0.1:{port}"},
        "engine": {"target": f"ipv4:127.0.0.1:{nowhere}"},
    }
    async with (
        ScriptedMesh(tmp_path, **sections) as mesh,
        aiohttp.ClientSession(base_url=mesh.http_url) as http,
    ):
        async with http.get("/readyz") as response:
            assert response.status == 503
            assert response.headers["Retry-After"] == "1"
        async with http.get("/healthz") as response:
            assert response.status == 200


# --- who may ask


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({"Sec-Fetch-Site": "same-origin"}, 200),
        ({"Sec-Fetch-Site": "cross-site"}, 403),
        ({"Sec-Fetch-Site": "same-site"}, 403),
        ({"Origin": "https://example.com"}, 403),
        ({"Host": "rebound.example.com"}, 403),
        ({"Host": "localhost:8080"}, 200),
        ({"Host": "[::1]"}, 200),
    ],
)
async def test_without_keys_only_its_own_pages_may_call(
    http: aiohttp.ClientSession, headers: dict[str, str], status: int
) -> None:
    async with http.get("/api/models", headers=headers) as response:
        assert response.status == status


async def test_where_keys_are_asked_for_a_call_needs_one(tmp_path: Path) -> None:
    (port,) = free_ports(1)
    gateway = {
        "http_listen": f"127.0.0.1:{port}",
        "auth": {
            "mode": "required",
            "keys": [
                {"name": "acme", "sha256": digest(KEY)},
            ],
        },
    }
    async with (
        ScriptedMesh(tmp_path, gateway=gateway) as mesh,
        aiohttp.ClientSession(base_url=mesh.http_url) as http,
    ):
        async with http.post("/api/chat", json=chat_body()) as response:
            assert response.status == 401
            assert response.headers["WWW-Authenticate"] == "Bearer"
            assert (await response.json())["error"]["reason"] == "API_KEY_MISSING"
        # Nothing of a body is read for those who may not ask.
        async with http.post("/api/chat", data=b"a" * 2**20) as response:
            assert response.status == 401
        for key, operator in ((KEY, False),):
            authorization = {"Authorization": f"Bearer {key}"}
            async with http.get("/api/session", headers=authorization) as response:
                assert (await response.json())["operator"] is operator
            async with http.post("/api/chat", json=chat_body(), headers=authorization) as response:
                assert response.status == 200
                assert await text_of(response) == "onetwo"
        # Another name for the gateway is fine: a page of another site has no key.
        async with http.get("/", headers={"Host": "llm.example.com"}) as response:
            assert response.status == 200


# --- pages


async def test_pages_are_kept_for_good_and_the_first_is_asked_for_each_time(
    http: aiohttp.ClientSession,
) -> None:
    async with http.get("/") as response:
        page = await response.text()
        assert response.headers["Cache-Control"] == "no-cache"
        etag = response.headers["ETag"]
    async with http.get("/", headers={"If-None-Match": etag}) as response:
        assert response.status == 304
    paths = re.findall(r'(?:src|href)="(/assets/[^"]+)"', page)
    assert any(path.endswith(".js") for path in paths)
    for path in paths:
        async with http.get(path) as response:
            assert response.status == 200
            assert "immutable" in response.headers["Cache-Control"]
            assert response.headers["X-Content-Type-Options"] == "nosniff"


async def test_pages_run_nothing_that_the_gateway_did_not_serve(
    http: aiohttp.ClientSession,
) -> None:
    for path in ("/", "/nothing", "/api/models"):
        async with http.get(path) as response:
            policy = response.headers["Content-Security-Policy"]
            assert "default-src 'none'" in policy
            assert "unsafe" not in policy


# --- the end


async def test_what_is_in_flight_ends_well_and_nothing_new_is_taken(
    mesh: ScriptedMesh, http: aiohttp.ClientSession
) -> None:
    go_on = asyncio.Event()

    async def script(request: EngineRequest) -> AsyncIterator[EngineResponse]:
        yield chunk((0, b"begun "))
        await go_on.wait()
        yield chunk((0, b"ended"))
        yield complete()

    mesh.engine.script = script
    async with http.post("/api/chat", json=chat_body()) as response:
        events = events_of(response)
        await anext(events)
        await mesh.gateway.drain()
        mesh.gateway.draining.set()
        with pytest.raises(aiohttp.ClientError):
            async with http.get("/healthz"):
                pass
        go_on.set()
        assert [event async for event, _ in events][-1] == "done"


# --- TLS


async def test_it_serves_https_with_the_certificates_of_the_grpc_port(tmp_path: Path) -> None:
    certificate, private_key = tmp_path / "tls.crt", tmp_path / "tls.key"
    subprocess.run(
        [
            *["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2"],
            *["-keyout", private_key, "-out", certificate],
            *["-subj", "/CN=gateway", "-addext", "subjectAltName=IP:127.0.0.1"],
        ],
        check=True,
        capture_output=True,
    )
    (port,) = free_ports(1)
    tls = {"certificate": certificate, "private_key": private_key}
    gateway = {"http_listen": f"127.0.0.1:{port}", "tls": tls}
    trust = ssl.create_default_context(cafile=certificate)
    async with ScriptedMesh(tmp_path, gateway=gateway), aiohttp.ClientSession() as http:
        async with http.get(f"https://127.0.0.1:{port}/healthz", ssl=trust) as response:
            assert response.status == 200
        with pytest.raises(aiohttp.ClientError):
            await http.get(f"http://127.0.0.1:{port}/healthz")
