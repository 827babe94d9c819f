"""The HTTP listener: its life, its health, and the headers that every answer has."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterable

from aiohttp import web

from services.gateway.http.calls import Handler, errors_as_json
from services.gateway.http.connections import Connections
from services.gateway.http.origin import check_host
from services.gateway.http.records import HttpRecords
from services.runtime.errors import Reason, ServiceError
from services.runtime.server import StartupError
from services.runtime.settings import GatewaySettings
from services.runtime.settings.addresses import is_loopback, split_address
from services.runtime.telemetry import Metrics
from services.runtime.tls import ServerCertificates

# What a request's JSON has around its prompt.
ENVELOPE_BYTES = 2**20
IDLE_TIMEOUT_S = 75.0

SECURITY_HEADERS = {
    "Content-Security-Policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; "
        "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    ),
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Permissions-Policy": "camera=(), microphone=(), geolocation=()",
}

Probe = Callable[[], Awaitable[None]]


class HttpServer:
    """Serves routes beside /healthz and /readyz."""

    def __init__(
        self,
        settings: GatewaySettings,
        routes: Iterable[web.AbstractRouteDef],
        *,
        probe: Probe,
        draining: asyncio.Event,
        keys_required: bool,
        metrics: Metrics,
    ) -> None:
        assert settings.http_listen is not None
        self._settings = settings
        self._listen = settings.http_listen
        self._probe = probe
        self._draining = draining
        self._metrics = metrics
        records = HttpRecords(metrics)
        middlewares = [records.middleware, errors_as_json]
        if not keys_required and is_loopback(self._listen):
            middlewares.append(_known_hosts_only)
        application = web.Application(
            middlewares=middlewares,
            client_max_size=settings.max_prompt_bytes + ENVELOPE_BYTES,
        )
        application.add_routes(
            [web.get("/healthz", self._live), web.get("/readyz", self._ready), *routes]
        )
        application.on_response_prepare.append(_add_security_headers)
        application.on_response_prepare.append(records.prepared)
        self._runner = web.AppRunner(
            application,
            # A browser that goes away cancels what is done for it.
            handler_cancellation=True,
            access_log=None,
            keepalive_timeout=IDLE_TIMEOUT_S,
            # The library waits as long twice: for answers to end, and for their connections.
            shutdown_timeout=settings.drain_timeout_s / 2,
        )
        self._listener: asyncio.Server | None = None
        self._closing: asyncio.Task[None] | None = None

    async def start(self, certificates: ServerCertificates | None) -> None:
        """Listens, with the certificates of the gRPC port. Raises StartupError."""
        host, port = split_address(self._listen)
        context = certificates.for_http() if certificates is not None else None
        await self._runner.setup()
        assert self._runner.server is not None
        connections = Connections(
            self._runner.server, self._settings.max_http_connections, self._metrics
        )
        loop = asyncio.get_running_loop()
        try:
            self._listener = await loop.create_server(connections, host, port, ssl=context)
        except OSError as error:
            await self._runner.cleanup()
            raise StartupError(
                f"the HTTP address {self._listen} cannot be listened on: {error.strerror or error}",
                "stop what uses it, or set gateway.http_listen to another address or to null",
            ) from error

    def close(self) -> None:
        """Takes nothing new; what is in flight may come to its end within the drain timeout."""
        if self._listener is not None:
            self._listener.close()
        self._closing = asyncio.create_task(self._runner.cleanup())

    async def closed(self) -> None:
        """Returns once nothing is in flight."""
        if self._closing is None:
            self.close()
        assert self._closing is not None
        await self._closing

    async def _live(self, request: web.Request) -> web.Response:
        """The process answers."""
        return web.json_response({"status": "live"})

    async def _ready(self, request: web.Request) -> web.Response:
        """It can do its work: what gRPC health says."""
        if self._draining.is_set():
            raise ServiceError(Reason.DRAINING, "the gateway is shutting down", retry_after_s=1.0)
        try:
            await self._probe()
        except Exception as error:
            raise ServiceError(Reason.SERVICE_UNAVAILABLE, str(error), retry_after_s=1.0) from error
        return web.json_response({"status": "ready"})


@web.middleware
async def _known_hosts_only(request: web.Request, handler: Handler) -> web.StreamResponse:
    check_host(request)
    return await handler(request)


async def _add_security_headers(request: web.Request, response: web.StreamResponse) -> None:
    response.headers.update(SECURITY_HEADERS)
    # Its name and version are nobody's business.
    response.headers["Server"] = "meshserve"
    if "Cache-Control" not in response.headers:
        response.headers["Cache-Control"] = "no-store"
