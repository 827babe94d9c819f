"""What happens around every call that a service answers: trace, deadline, errors, metrics.

One interceptor wraps the four RPC shapes itself: a span per call whatever its shape, the caller's
trace context and deadline in force while the servicer runs, a ServiceError turned into its status,
anything else into INTERNAL without a word about our insides, and bytes that are no message into
INVALID_ARGUMENT instead of gRPC's own INTERNAL.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any, NoReturn, Self

import grpc
from google.protobuf.message import DecodeError
from opentelemetry import context as otel_context
from opentelemetry.trace import SpanKind, Status, StatusCode, set_span_in_context

from services.runtime import deadline
from services.runtime.errors import Reason, ServiceError, status_metadata
from services.runtime.telemetry import Metrics, get_tracer
from services.runtime.telemetry.tracing import extract_context, mark_failed

log = logging.getLogger(__name__)

# Watched all the time by machines; spans of them would bury the rest.
UNTRACED_PREFIXES = ("/grpc.health.v1.", "/grpc.reflection.")
# A call cut off this shortly before its deadline was cut off by it: the caller's clock and timer
# are not ours.
DEADLINE_TOLERANCE_S = 0.02


class _Malformed:
    """Stands for a request whose bytes are not a message."""

    def __init__(self, error: Exception) -> None:
        self.error = error


def _tolerant(deserialize: Callable[[bytes], Any] | None) -> Callable[[bytes], Any]:
    def deserialize_or_mark(data: bytes) -> Any:
        try:
            return data if deserialize is None else deserialize(data)
        except (DecodeError, ValueError) as error:
            return _Malformed(error)

    return deserialize_or_mark


def _checked(request: Any) -> Any:
    if isinstance(request, _Malformed):
        raise ServiceError(
            Reason.MALFORMED_MESSAGE,
            "the request is not a message of the expected type; is all of its text UTF-8?",
        )
    return request


async def _checked_stream(requests: AsyncIterator[Any]) -> AsyncIterator[Any]:
    async for request in requests:
        yield _checked(request)


class CallInterceptor(grpc.aio.ServerInterceptor):
    """Wraps every handler of a server. Streaming servicers are async generators."""

    def __init__(self, metrics: Metrics) -> None:
        self.tracer = get_tracer()
        self._metrics = metrics
        self._wrapped: dict[str, Any] = {}
        self._in_flight = 0
        self._none_in_flight = asyncio.Event()
        self._none_in_flight.set()

    async def ended(self, timeout_s: float) -> None:
        """Returns once no servicer is at work, or after a time-out, which is logged."""
        try:
            async with asyncio.timeout(timeout_s):
                await self._none_in_flight.wait()
        except TimeoutError:
            log.warning("calls do not end", extra={"calls": self._in_flight})

    async def intercept_service(
        self,
        continuation: Callable[[Any], Awaitable[Any]],
        handler_call_details: Any,
    ) -> Any:
        """The handler that gRPC found, wrapped; None where it found none."""
        method: str = handler_call_details.method
        wrapped = self._wrapped.get(method)
        if wrapped is not None:
            return wrapped
        handler = await continuation(handler_call_details)
        if handler is None or method.startswith(UNTRACED_PREFIXES):
            return handler
        wrap = self._wrap_stream if handler.response_streaming else self._wrap_unary
        kind = f"{'stream' if handler.request_streaming else 'unary'}_" + (
            "stream" if handler.response_streaming else "unary"
        )
        make_handler = getattr(grpc, f"{kind}_rpc_method_handler")
        # The same for every call of a method that exists.
        wrapped = self._wrapped[method] = make_handler(
            wrap(method.removeprefix("/"), getattr(handler, kind), handler),
            request_deserializer=_tolerant(handler.request_deserializer),
            # Responses leave our wrapper as bytes: a failure to serialize one must become our
            # INTERNAL, where gRPC would tell the caller the exception's text.
            response_serializer=None,
        )
        return wrapped

    def _wrap_unary(self, method: str, behaviour: Any, handler: Any) -> Any:
        check = _checked_stream if handler.request_streaming else _checked
        serialize = handler.response_serializer or bytes
        records = _Records(method, self._metrics)

        async def answer(request: Any, context: Any) -> Any:
            with _Call(self, records, context) as call:
                try:
                    response = await behaviour(check(request), context)
                    # A servicer that set a status itself returns what gRPC will discard.
                    return b"" if call.adopt_own_status() else serialize(response)
                except BaseException as error:
                    await call.fail(error)

        return answer

    def _wrap_stream(self, method: str, behaviour: Any, handler: Any) -> Any:
        check = _checked_stream if handler.request_streaming else _checked
        serialize = handler.response_serializer or bytes
        records = _Records(method, self._metrics)

        async def answer(request: Any, context: Any) -> AsyncIterator[Any]:
            with _Call(self, records, context) as call:
                try:
                    responses = behaviour(check(request), context)
                    try:
                        async for response in responses:
                            yield serialize(response)
                    finally:
                        # A servicer left in the middle must release what it holds now, not when
                        # the garbage collector comes by.
                        await responses.aclose()
                    call.adopt_own_status()
                except GeneratorExit:
                    call.cancelled()
                    raise
                except BaseException as error:
                    await call.fail(error)

        return answer

    def begin(self) -> None:
        """A servicer goes to work."""
        self._in_flight += 1
        self._none_in_flight.clear()

    def end(self) -> None:
        """A servicer is done."""
        self._in_flight -= 1
        if not self._in_flight:
            self._none_in_flight.set()


class _Records:
    """What is counted of the calls of one method."""

    def __init__(self, method: str, metrics: Metrics) -> None:
        self.method = method
        self.calls = metrics.counter("meshserve_rpc_server_calls")
        self.duration = metrics.histogram("meshserve_rpc_server_duration_seconds").labels(method)
        self.active = metrics.gauge("meshserve_rpc_server_active_calls").labels(method)


class _Call:
    """One call while it is answered, and its outcome."""

    def __init__(self, interceptor: CallInterceptor, records: _Records, context: Any) -> None:
        self.code = grpc.StatusCode.OK
        self._interceptor = interceptor
        self._records = records
        self._context = context
        self._started = time.perf_counter()

    def __enter__(self) -> Self:
        # gRPC runs each call in a task of its own, so what is set here ends with the call.
        deadline.set_remaining(self._context.time_remaining())
        method = self._records.method
        self._span = self._interceptor.tracer.start_span(
            method,
            extract_context(self._context.invocation_metadata() or ()),
            SpanKind.SERVER,
            {"rpc.system.name": "grpc", "rpc.method": method},
        )
        otel_context.attach(set_span_in_context(self._span))
        self._records.active.inc()
        self._interceptor.begin()
        return self

    def __exit__(self, *_: object) -> None:
        self._interceptor.end()
        records, code = self._records, self.code.name
        records.active.dec()
        records.calls.labels(records.method, code).inc()
        records.duration.observe(time.perf_counter() - self._started)
        self._span.set_attribute("rpc.response.status_code", code)
        self._span.end()

    def adopt_own_status(self) -> bool:
        """Whether the servicer gave the call a status of its own, which is then recorded."""
        code = self._context.code()
        if code is None or code is grpc.StatusCode.OK:
            return False
        self.code = code
        self._mark(code.name)
        return True

    def cancelled(self) -> None:
        """Records that the caller went away or its deadline passed."""
        remaining = self._context.time_remaining()
        late = remaining is not None and remaining <= DEADLINE_TOLERANCE_S
        self.code = grpc.StatusCode.DEADLINE_EXCEEDED if late else grpc.StatusCode.CANCELLED
        # A caller may change its mind; that is no failure.
        if late:
            self._mark(self.code.name)

    async def fail(self, error: BaseException) -> NoReturn:
        """Turns an exception of the servicer into the status that the caller gets."""
        if isinstance(error, asyncio.CancelledError):
            self.cancelled()
            raise error
        if isinstance(error, grpc.aio.AbortError):
            self.adopt_own_status()
            raise error
        if not isinstance(error, Exception):
            self.code = grpc.StatusCode.INTERNAL
            self._mark(type(error).__name__)
            raise error
        if not isinstance(error, ServiceError):
            log.error("unexpected error", exc_info=error, extra={"method": self._records.method})
            error = ServiceError(Reason.INTERNAL, "internal error; the server's log has the rest")
        self.code = error.code
        mark_failed(self._span, error)
        details = status_metadata(error)
        await self._context.abort(error.code, error.header_message, details)
        raise AssertionError("abort always raises")

    def _mark(self, error_type: str) -> None:
        self._span.set_attribute("error.type", error_type)
        self._span.set_status(Status(StatusCode.ERROR, error_type))
