"""What a call by HTTP cannot do: wait for ever, see what is not its own, learn of our insides."""

from __future__ import annotations

import asyncio
import json
import socket
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import aiohttp
import pytest
from opentelemetry.trace import INVALID_SPAN

from meshserve.v1 import gateway_pb2
from services.gateway.context import RequestContext
from services.gateway.http.errors import error_document, http_status
from services.gateway.recent import RecentRequests
from services.runtime.errors import REASONS, Reason, ServiceError
from tests.console.streams import chat_body, events_of
from tests.console.test_calls import bearer, guarded_gateway, recent
from tests.fakes.scripted_mesh import EngineRequest, EngineResponse, ScriptedMesh, chunk, encode
from tests.support.waiting import until

STATUS_OF_CODE = {
    "INVALID_ARGUMENT": 400,
    "FAILED_PRECONDITION": 400,
    "UNAUTHENTICATED": 401,
    "PERMISSION_DENIED": 403,
    "NOT_FOUND": 404,
    "ALREADY_EXISTS": 409,
    "ABORTED": 409,
    "RESOURCE_EXHAUSTED": 429,
    "CANCELLED": 499,
    "INTERNAL": 500,
    "UNIMPLEMENTED": 501,
    "UNAVAILABLE": 503,
    "DEADLINE_EXCEEDED": 504,
}


def test_a_status_is_what_http_calls_the_code() -> None:
    own_words = {Reason.MESSAGE_TOO_LARGE: 413, Reason.METHOD_NOT_ALLOWED: 405}
    for reason in Reason:
        wanted = own_words.get(reason, STATUS_OF_CODE[REASONS[reason].code.name])
        assert http_status(reason) == wanted, reason


def test_a_limit_is_told_with_its_subject_and_the_time_to_wait() -> None:
    limit = ServiceError(
        Reason.RATE_LIMITED,
        "slow down",
        retry_after_s=2.5,
        quota_violations=[("acme", "60 a minute")],
    )
    error = error_document(limit)["error"]
    assert error["quotas"] == [{"subject": "acme", "description": "60 a minute"}]
    assert error["retry_after_s"] == 2.5


# --- time


def connection_to(mesh: ScriptedMesh) -> socket.socket:
    """A connection that reads little: what it is sent soon waits for it."""
    address = urlsplit(mesh.http_url)
    made = socket.socket()
    made.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    made.setblocking(False)
    made.connect_ex((address.hostname, address.port))
    return made


def post(length: int) -> bytes:
    return (
        "POST /api/chat HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
        f"Content-Length: {length}\r\n\r\n"
    ).encode()


async def test_a_body_that_does_not_come_is_not_waited_for(
    mesh: ScriptedMesh, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("services.gateway.http.calls.BODY_TIMEOUT_S", 0.2)
    loop = asyncio.get_running_loop()
    with connection_to(mesh) as connection:
        await loop.sock_sendall(connection, post(100) + b'{"request"')
        async with asyncio.timeout(30):
            assert (await loop.sock_recv(connection, 100)).startswith(b"HTTP/1.1 504")


async def test_a_reader_that_takes_nothing_frees_the_engine(
    mesh: ScriptedMesh, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("services.gateway.http.streams.WRITE_TIMEOUT_S", 0.2)

    async def floods(request: EngineRequest) -> AsyncIterator[EngineResponse]:
        while True:
            yield chunk((0, encode("one") * 20_000))
            await asyncio.sleep(0.005)

    mesh.engine.script = floods
    loop = asyncio.get_running_loop()
    body = json.dumps(chat_body()).encode()
    with connection_to(mesh) as connection:
        await loop.sock_sendall(connection, post(len(body)) + body)
        await until(lambda: mesh.engine.left == 1)


async def test_a_quiet_stream_shows_that_it_is_open(
    http: aiohttp.ClientSession, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("services.gateway.http.streams.HEARTBEAT_S", 0.05)
    async with http.get("/api/requests") as response, asyncio.timeout(30):
        await response.content.readuntil(b"\n\n")
        while await response.content.readuntil(b"\n\n") != b":\n\n":
            pass


async def test_a_gateway_that_shuts_down_takes_no_further_call_on_a_connection(
    mesh: ScriptedMesh, http: aiohttp.ClientSession
) -> None:
    mesh.gateway.draining.set()
    for path in ("/api/models", "/readyz"):
        async with http.get(path) as response:
            assert (response.status, response.headers["Retry-After"]) == (503, "1")
            assert (await response.json())["error"]["reason"] == "DRAINING"


# --- what is not one's own


async def test_a_form_of_another_page_is_no_request(http: aiohttp.ClientSession) -> None:
    """A browser sends forms and plain text anywhere without asking first; JSON it does not."""
    for kind in ("text/plain", "application/x-www-form-urlencoded"):
        headers = {"content-type": kind}
        body = json.dumps(chat_body())
        async with http.post("/api/chat", data=body, headers=headers) as response:
            assert response.status == 400
            assert (await response.json())["error"]["reason"] == "MALFORMED_MESSAGE"


async def test_a_tenant_does_not_see_what_others_have_in_flight(tmp_path: Path) -> None:
    async def goes_on(request: EngineRequest) -> AsyncIterator[EngineResponse]:
        yield chunk((0, encode("one")))
        await asyncio.Event().wait()

    async with (
        guarded_gateway(tmp_path, goes_on) as http,
        http.post("/api/chat", json=chat_body(), headers=bearer("acme")) as response,
    ):
        await anext(events_of(response))
        seen = {key: await recent(http, headers=bearer(key)) for key in ("acme", "other", "ops")}
    tenants = {
        key: {each["tenant"] for each in told.get("in_flight", [])} for key, told in seen.items()
    }
    assert tenants == {"acme": {"acme"}, "other": set(), "ops": {"acme"}}


async def test_a_defect_is_told_by_its_reason_alone(
    http: aiohttp.ClientSession, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*_: Any) -> str:
        raise RuntimeError("a password in a message")

    monkeypatch.setattr("services.gateway.console.routes.version", fails)
    async with http.get("/api/session") as response:
        assert response.status == 500
        text = await response.text()
    assert json.loads(text)["error"]["reason"] == "INTERNAL"
    assert "password" not in text
    assert "Traceback" not in text


def test_what_is_kept_of_a_request_is_short_and_leads_nowhere_where_there_is_no_trace() -> None:
    recent = RecentRequests()
    context = RequestContext(
        request=gateway_pb2.GenerateRequest(),
        operation="chat",
        streaming=False,
        metadata={},
        request_id="x" * 10**6,
        span=INVALID_SPAN,
    )
    recent.end(recent.begin(context), reason="INVALID_FIELD")
    (kept,) = recent.report().finished
    assert (len(kept.request_id), kept.trace_id) == (128, "")
