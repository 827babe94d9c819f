"""What happens around every call that comes by HTTP: caller, deadline, trace, body, errors.

A call goes on to the same servicers that answer gRPC, so there is one request path.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import TypeVar

from aiohttp import web
from google.protobuf import json_format
from google.protobuf.message import Message
from opentelemetry.trace import SpanKind, use_span

from services.gateway.context import Tenant
from services.gateway.http.errors import error_response, from_aiohttp, http_status
from services.gateway.http.origin import check_origin
from services.gateway.stages.authenticate import Authenticator
from services.runtime import deadline
from services.runtime.errors import Reason, ServiceError
from services.runtime.settings import GatewaySettings
from services.runtime.telemetry import get_tracer
from services.runtime.telemetry.tracing import extract_context, mark_failed

log = logging.getLogger(__name__)

# A caller's own limit for the answer as a whole, in seconds.
TIMEOUT_HEADER = "meshserve-timeout-s"
MAX_TIMEOUT_S = 86_400.0
# A body that comes more slowly than this is not waited for.
BODY_TIMEOUT_S = 30.0

MessageT = TypeVar("MessageT", bound=Message)


class Call:
    """One call by HTTP. Servicers take it for the context of a gRPC call."""

    def __init__(self, request: web.Request, tenant: Tenant) -> None:
        self.request = request
        self.tenant = tenant

    @property
    def authorization(self) -> str | None:
        """The header that says who calls."""
        return self.request.headers.get("authorization")

    def invocation_metadata(self) -> tuple[tuple[str, str], ...]:
        """What a gRPC caller would have sent as metadata."""
        return (("authorization", self.authorization),) if self.authorization else ()

    async def message(self, kind: type[MessageT]) -> MessageT:
        """The body, which is the JSON form of a message. Raises ServiceError."""
        if self.request.content_type != "application/json":
            raise ServiceError(
                Reason.MALFORMED_MESSAGE, "the body must be JSON, and content-type must say so"
            )
        try:
            async with asyncio.timeout(BODY_TIMEOUT_S):
                body = await self.request.read()
        except TimeoutError:
            raise ServiceError(
                Reason.DEADLINE_EXCEEDED, f"the body did not come within {BODY_TIMEOUT_S:.0f} s"
            ) from None
        try:
            return json_format.Parse(body, kind())
        except (json_format.ParseError, UnicodeDecodeError, RecursionError) as error:
            raise ServiceError(
                Reason.MALFORMED_MESSAGE, f"the body is no {kind.DESCRIPTOR.name}: {error}"
            ) from error


Answer = Callable[[Call], Awaitable[web.StreamResponse]]
Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


class Calls:
    """Wraps what answers calls."""

    def __init__(
        self, settings: GatewaySettings, authenticator: Authenticator, draining: asyncio.Event
    ) -> None:
        self._settings = settings
        self._authenticator = authenticator
        self._draining = draining
        self._tracer = get_tracer()

    def answered_by(self, answer: Answer) -> Handler:
        """A handler: the caller is known before the body is read, the call has a deadline and a
        span."""

        async def handle(request: web.Request) -> web.StreamResponse:
            tenant = self._admit(request)
            deadline.set_remaining(self._timeout_s(request))
            route = route_of(request)
            span = self._tracer.start_span(
                f"{request.method} {route}",
                extract_context(request.headers.items()),
                SpanKind.SERVER,
                {"http.request.method": request.method, "http.route": route},
            )
            status = 499
            try:
                # Also where it is not recorded: what is done for it is not recorded either.
                with use_span(span, record_exception=False, set_status_on_exception=False):
                    response = await answer(Call(request, tenant))
                status = response.status
                return response
            except ServiceError as error:
                status = http_status(error.reason)
                mark_failed(span, error)
                raise
            finally:
                span.set_attribute("http.response.status_code", status)
                span.end()

        return handle

    def watched_by(self, answer: Answer) -> Handler:
        """A handler of what is watched for hours: it has neither deadline nor span."""

        async def handle(request: web.Request) -> web.StreamResponse:
            return await answer(Call(request, self._admit(request)))

        return handle

    def _admit(self, request: web.Request) -> Tenant:
        if self._draining.is_set():
            raise ServiceError(Reason.DRAINING, "the gateway is shutting down", retry_after_s=1.0)
        check_origin(request)
        return self._authenticator.tenant(request.headers.get("authorization"))

    def _timeout_s(self, request: web.Request) -> float:
        text = request.headers.get(TIMEOUT_HEADER)
        if text is None:
            return self._settings.default_timeout_s
        try:
            timeout_s = float(text)
        except ValueError:
            timeout_s = -1.0
        if not 0 < timeout_s <= MAX_TIMEOUT_S:
            raise ServiceError(
                Reason.INVALID_FIELD,
                f"{TIMEOUT_HEADER} must lie in (0, {MAX_TIMEOUT_S:g}]",
                field_violations=[(TIMEOUT_HEADER, "not a number of seconds")],
            )
        return timeout_s


@contextlib.asynccontextmanager
async def until_deadline() -> AsyncIterator[None]:
    """Ends what is within once the call's deadline has passed. Raises ServiceError."""
    try:
        async with asyncio.timeout(deadline.remaining_s()):
            yield
    except TimeoutError:
        raise ServiceError(Reason.DEADLINE_EXCEEDED, "the deadline passed") from None


@web.middleware
async def errors_as_json(request: web.Request, handler: Handler) -> web.StreamResponse:
    """Every failure as a document that tells its reason, and nothing of our insides."""
    try:
        return await handler(request)
    except ServiceError as error:
        return error_response(error)
    except web.HTTPException as error:
        if error.status < 400:
            raise
        return error_response(from_aiohttp(error))
    except Exception:
        log.exception("unexpected error", extra={"path": request.path})
        return error_response(
            ServiceError(Reason.INTERNAL, "internal error; the server's log has the rest")
        )


def route_of(request: web.Request) -> str:
    """The pattern of the path, not the path: it has few values. Empty where nothing is served."""
    resource = request.match_info.route.resource
    return resource.canonical if resource is not None else ""
