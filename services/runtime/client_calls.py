"""What happens around every call that a service makes: trace, deadline, errors, metrics.

The caller's side of server_calls.py. Calls pass on the trace context and the remaining deadline,
raise ServiceError instead of AioRpcError, and leave a client span and metrics whatever their shape.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any, Protocol, Self

import grpc
from google.protobuf.message import DecodeError
from opentelemetry.sdk.trace.id_generator import RandomIdGenerator
from opentelemetry.trace import (
    NonRecordingSpan,
    Span,
    SpanContext,
    SpanKind,
    Status,
    StatusCode,
)

from services.runtime import deadline
from services.runtime.errors import Reason, ServiceError
from services.runtime.telemetry import Metrics, get_tracer
from services.runtime.telemetry.tracing import metadata_of


class Method:
    """One RPC, and how its messages become bytes and back.

    gRPC logs the exception of a codec and goes on with an empty message or None; here it is raised.
    """

    def __init__(
        self,
        path: str,
        make_call: Callable[..., Any],
        request_streaming: bool,
        request_serializer: Callable[[Any], bytes] | None = None,
        response_deserializer: Callable[[bytes], Any] | None = None,
        **options: Any,
    ) -> None:
        self.name = path.removeprefix("/")
        self._call = make_call(path, **options)
        self._send = self._serialized if request_streaming else self.to_bytes
        self._serialize = request_serializer or bytes
        self._deserialize = response_deserializer or bytes

    def start(self, requests: Any, **options: Any) -> Any:
        """The gRPC call. `requests` is one message, an iterator of them, or None to write them."""
        if requests is None:
            return self._call(**options)
        return self._call(self._send(requests), **options)

    def to_bytes(self, request: Any) -> bytes:
        """One request, unless it is in bytes already; raises what the serializer raises."""
        return request if isinstance(request, bytes) else self._serialize(request)

    def from_bytes(self, data: bytes, peer: str) -> Any:
        """One response. Raises ServiceError."""
        try:
            return self._deserialize(data)
        except (DecodeError, ValueError):
            raise ServiceError(
                Reason.INTERNAL,
                f"the {peer} service sent what is no answer of the expected type",
                metadata={"service": peer},
            ) from None

    async def _serialized(self, requests: Any) -> AsyncIterator[bytes]:
        if hasattr(requests, "__aiter__"):
            async for request in requests:
                yield self.to_bytes(request)
        else:
            for request in requests:
                yield self.to_bytes(request)


class Instruments:
    """What is recorded of the calls to one peer."""

    def __init__(self, peer: str, target: str, metrics: Metrics) -> None:
        self.peer = peer
        self._target = target
        self._calls = metrics.counter("meshserve_rpc_client_calls")
        self._duration = metrics.histogram("meshserve_rpc_client_duration_seconds")
        self._tracer = get_tracer()

    def start(self, method: str) -> Span:
        return self._tracer.start_span(
            method,
            kind=SpanKind.CLIENT,
            attributes={
                "rpc.system.name": "grpc",
                "rpc.method": method,
                "server.address": self._target,
            },
        )

    def end(self, method: str, span: Span, started: float, error: BaseException | None) -> None:
        code, kind = _outcome(error)
        if kind:
            span.set_attribute("error.type", kind)
            span.set_status(Status(StatusCode.ERROR, kind))
        span.set_attribute("rpc.response.status_code", code)
        span.end()
        self._calls.labels(method, code).inc()
        self._duration.labels(method).observe(time.perf_counter() - started)


def _outcome(error: BaseException | None) -> tuple[str, str]:
    """The gRPC code of a call's end, and what went wrong: nothing if we gave the call up."""
    if error is None:
        return grpc.StatusCode.OK.name, ""
    if isinstance(error, ServiceError):
        return error.code.name, error.reason.value
    if isinstance(error, asyncio.CancelledError | GeneratorExit):
        return grpc.StatusCode.CANCELLED.name, ""
    # A defect on this side, for example a request of the wrong type.
    return grpc.StatusCode.INTERNAL.name, type(error).__name__


class CallCarrier(Protocol):
    """Another way for short calls than a stream of their own."""

    async def call(
        self,
        method: str,
        request: bytes,
        metadata: tuple[tuple[str, str], ...],
        timeout_s: float | None,
    ) -> bytes | None:
        """The serialized response; None for a call that must go its own way. May raise
        ServiceError."""
        ...


def single_response(
    rpc: Method, instruments: Instruments, carrier: CallCarrier | None = None
) -> Callable[..., Awaitable[Any]]:
    """What a stub calls for an RPC that answers with one message."""

    async def invoke(request: Any, *, timeout: float | None = None) -> Any:
        """Raises ServiceError. `timeout` is in seconds; the remaining deadline bounds it."""
        started = time.perf_counter()
        span = instruments.start(rpc.name)
        failure: BaseException | None = None
        try:
            limit = deadline.bounded(timeout)
            metadata = metadata_of(span)
            data = None
            if carrier is not None:
                request = rpc.to_bytes(request)
                data = await carrier.call(rpc.name, request, metadata, limit)
                if data is None:
                    limit = deadline.bounded(timeout)
            if data is None:
                data = await rpc.start(request, timeout=limit, metadata=metadata)
            return rpc.from_bytes(data, instruments.peer)
        except grpc.RpcError as error:
            failure = ServiceError.from_rpc_error(error, peer=instruments.peer)
            raise failure from None
        except BaseException as error:
            failure = error
            raise
        finally:
            instruments.end(rpc.name, span, started, failure)

    return invoke


def response_stream(rpc: Method, instruments: Instruments) -> Callable[..., ResponseStream]:
    """What a stub calls for an RPC that answers with a stream."""

    def invoke(
        requests: Any = None, *, timeout: float | None = None, standing: bool = False
    ) -> ResponseStream:
        """A `standing` stream outlives the call it was opened in: it has no deadline, and no span
        on either side, since it belongs to no one request."""
        span = NonRecordingSpan(_unsampled()) if standing else instruments.start(rpc.name)
        started = time.perf_counter()
        try:
            limit = timeout if standing else deadline.bounded(timeout)
            responses = rpc.start(requests, timeout=limit, metadata=metadata_of(span))
        except BaseException as error:
            instruments.end(rpc.name, span, started, error)
            raise
        return ResponseStream(responses, rpc, span, instruments)

    return invoke


def _unsampled() -> SpanContext:
    """A context that tells the other side not to record."""
    ids = RandomIdGenerator()
    return SpanContext(ids.generate_trace_id(), ids.generate_span_id(), is_remote=False)


class ResponseStream:
    """Responses of a streaming call, as an async iterator that raises ServiceError.

    Exhaust it or cancel it; `async with` does the latter. One that is dropped in the middle is
    cancelled when it is collected.
    """

    def __init__(self, call: Any, rpc: Method, span: Span, instruments: Instruments) -> None:
        self._call = call
        self._rpc = rpc
        self._span: Span | None = span
        self._instruments = instruments
        self._started = time.perf_counter()
        self._messages: AsyncIterator[Any] = aiter(call)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        self.cancel()

    def __del__(self) -> None:
        # The loop may be gone at the end of a process, and the call with it.
        with contextlib.suppress(RuntimeError):
            self.cancel()

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> Any:
        try:
            return self._rpc.from_bytes(await anext(self._messages), self._instruments.peer)
        except StopAsyncIteration:
            self._end(None)
            raise
        except grpc.RpcError as error:
            failure = ServiceError.from_rpc_error(error, peer=self._instruments.peer)
            self._end(failure)
            raise failure from None
        except BaseException as error:
            self._call.cancel()
            self._end(error)
            raise

    async def write(self, request: Any) -> None:
        """Sends one request of a bidirectional call; returns once the transport took it.

        Raises ServiceError, also when the call has ended.
        """
        peer = self._instruments.peer
        try:
            await self._call.write(self._rpc.to_bytes(request))
        except grpc.RpcError as error:
            raise ServiceError.from_rpc_error(error, peer=peer) from None
        except asyncio.InvalidStateError:
            raise ServiceError(
                Reason.SERVICE_UNAVAILABLE,
                f"the stream to the {peer} service has ended",
                retry_after_s=1.0,
                metadata={"service": peer},
            ) from None

    async def done_writing(self) -> None:
        """Says that no more requests follow; does nothing when the call has ended."""
        with contextlib.suppress(asyncio.InvalidStateError):
            await self._call.done_writing()

    def cancel(self) -> None:
        """Ends the call if it has not ended."""
        if self._span is not None:
            self._call.cancel()
            self._end(GeneratorExit())

    def _end(self, error: BaseException | None) -> None:
        if self._span is not None:
            self._instruments.end(self._rpc.name, self._span, self._started, error)
            self._span = None
