"""How many connections are open at a time: beyond the limit each gets one answer, and no more."""

from __future__ import annotations

import asyncio
import json
import math
from http import HTTPStatus
from typing import cast

from aiohttp import web

from services.gateway.http.errors import error_document, http_status
from services.runtime.errors import Reason, ServiceError
from services.runtime.telemetry import Metrics

RETRY_AFTER_S = 1.0
# A request that does not come within this is not told why it is refused.
REQUEST_TIMEOUT_S = 5.0


class Connections:
    """Makes the protocol of each connection, as `loop.create_server` wants it.

    Args:
        server: takes connections up to the limit; those that are idle it closes after a while.
        limit: how many.
    """

    def __init__(self, server: web.Server, limit: int, metrics: Metrics) -> None:
        self._server = server
        self._limit = limit
        self._refused = metrics.counter("meshserve_http_server_refused_connections")
        metrics.read("meshserve_http_server_connections", lambda: [((), len(server.connections))])

    def __call__(self) -> asyncio.BaseProtocol:
        """The protocol of a connection that has been accepted."""
        if len(self._server.connections) < self._limit:
            return self._server()
        self._refused.inc()
        return _Refusal(_answer(self._limit))


class _Refusal(asyncio.Protocol):
    """Answers what comes first, and closes."""

    def __init__(self, answer: bytes) -> None:
        self._answer = answer

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)
        loop = asyncio.get_running_loop()
        self._expiry = loop.call_later(REQUEST_TIMEOUT_S, transport.close)

    def data_received(self, data: bytes) -> None:
        self._transport.write(self._answer)
        self._transport.close()

    def connection_lost(self, exc: Exception | None) -> None:
        self._expiry.cancel()


def _answer(limit: int) -> bytes:
    error = ServiceError(
        Reason.LIMIT_REACHED,
        f"{limit} HTTP connections are open, as many as this gateway takes",
        metadata={"limit": "gateway.max_http_connections"},
        retry_after_s=RETRY_AFTER_S,
    )
    body = json.dumps(error_document(error)).encode()
    status = HTTPStatus(http_status(error.reason))
    head = (
        f"HTTP/1.1 {status.value} {status.phrase}",
        "Content-Type: application/json; charset=utf-8",
        f"Content-Length: {len(body)}",
        f"Retry-After: {math.ceil(RETRY_AFTER_S)}",
        "Connection: close",
        "Server: meshserve",
    )
    return "\r\n".join((*head, "", "")).encode() + body
