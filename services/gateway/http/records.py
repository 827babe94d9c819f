"""What is recorded of the calls that come by HTTP, whatever answers them."""

from __future__ import annotations

import time

from aiohttp import web

from services.gateway.http.calls import Handler, route_of
from services.runtime.telemetry import Metrics

# What a caller may have made up is counted as this.
OTHER = "other"
# RFC 9110 and RFC 5789.
METHODS = frozenset(
    {"CONNECT", "DELETE", "GET", "HEAD", "OPTIONS", "PATCH", "POST", "PUT", "TRACE"}
)
# As proxies log a caller who went away.
CLIENT_CLOSED = 499
# Set of a call whose answer is an open event stream.
STREAMS = web.RequestKey("streams", bool)


class HttpRecords:
    """Counts calls by the pattern of their path, and the event streams among them."""

    def __init__(self, metrics: Metrics) -> None:
        self._calls = metrics.counter("meshserve_http_server_calls")
        self._durations = metrics.histogram("meshserve_http_server_duration_seconds")
        self._active = metrics.gauge("meshserve_http_server_active_calls")
        self._streams = metrics.gauge("meshserve_http_server_event_streams")

    @web.middleware
    async def middleware(self, request: web.Request, handler: Handler) -> web.StreamResponse:
        """To be the outermost: it sees what errors have become."""
        method = request.method if request.method in METHODS else OTHER
        route = route_of(request) or OTHER
        status = CLIENT_CLOSED
        started = time.perf_counter()
        active = self._active.labels(route)
        active.inc()
        try:
            response = await handler(request)
            status = response.status
            return response
        finally:
            active.dec()
            if STREAMS in request:
                self._streams.labels(route).dec()
            self._calls.labels(method, route, str(status)).inc()
            self._durations.labels(method, route).observe(time.perf_counter() - started)

    async def prepared(self, request: web.Request, response: web.StreamResponse) -> None:
        """To be told of each answer before it is sent."""
        if response.content_type == "text/event-stream":
            request[STREAMS] = True
            self._streams.labels(route_of(request) or OTHER).inc()
