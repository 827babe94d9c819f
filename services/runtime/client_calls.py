"""What happens around every call that a service makes: trace, deadline, errors, metrics.

The caller's side of server_calls.py. Calls pass on the trace context and the remaining deadline,
raise ServiceError instead of AioRpcError, and leave a client span and metrics whatever their shape.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any, Protocol, TypeAlias

import grpc
from google.protobuf.message import DecodeError
from opentelemetry.trace import (
    Span,
    SpanKind,
    Status,
    StatusCode,
)

from services.runtime import deadline
from services.runtime.attempts import Attempts
from services.runtime.errors import Reason, ServiceError
from services.runtime.replicas import Replica
from services.runtime.telemetry import Metrics, get_tracer
from services.runtime.telemetry.tracing import metadata_of, server_attributes


class Method:
    """One RPC, and how its messages become bytes and back. `shape` is for example `unary_stream`.

    gRPC logs the exception of a codec and goes on with an empty message or None; here it is raised.
    """

    def __init__(
        self,
        path: str,
        shape: str,
        request_serializer: Callable[[Any], bytes] | None = None,
        response_deserializer: Callable[[bytes], Any] | None = None,
        **_: object,
    ) -> None:
        self.name = path.removeprefix("/")
        self.streams_requests = shape.startswith("stream")
        self._path = path
        self._shape = shape
        self._serialize = request_serializer or bytes
        self._deserialize = response_deserializer or bytes

    def start(self, replica: Replica, requests: Any, **options: Any) -> Any:
        """The gRPC call. `requests` are bytes, an iterator of messages, or None to write them."""
        call = replica.link.rpc(self._path, self._shape)
        if requests is None:
            return call(**options)
        return call(self._serialized(requests) if self.streams_requests else requests, **options)

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

    def __init__(self, peer: str, metrics: Metrics) -> None:
        self.peer = peer
        self._calls = metrics.counter("meshserve_rpc_client_calls")
        self._duration = metrics.histogram("meshserve_rpc_client_duration_seconds")
        # By method and code; looking them up by their labels would take longer than the rest.
        self._series: dict[tuple[str, str], tuple[Any, Any]] = {}
        self._tracer = get_tracer()

    def start(self, method: str) -> Span:
        """The span of a call."""
        return self._tracer.start_span(
            method,
            kind=SpanKind.CLIENT,
            attributes={
                "rpc.system.name": "grpc",
                "rpc.method": method,
            },
        )

    def asked(self, span: Span, replica: Replica) -> None:
        """Records which replica is asked."""
        if span.is_recording():
            span.set_attributes(server_attributes(replica.address))

    def retried(self, span: Span, replica: Replica | None, error: ServiceError) -> None:
        """Records that a try failed, and that another follows."""
        if span.is_recording():
            where = server_attributes(replica.address) if replica is not None else {}
            span.add_event("retried", {"error.type": error.reason.value, **where})

    def end(self, method: str, span: Span, started: float, error: BaseException | None) -> None:
        code, kind = _outcome(error)
        if kind:
            span.set_attribute("error.type", kind)
            span.set_status(Status(StatusCode.ERROR, kind))
        span.set_attribute("rpc.response.status_code", code)
        span.end()
        series = self._series.get((method, code))
        if series is None:
            series = (self._calls.labels(method, code), self._duration.labels(method))
            self._series[method, code] = series
        calls, duration = series
        calls.inc()
        duration.observe(time.perf_counter() - started)


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
        replica: Replica,
        method: str,
        request: bytes,
        metadata: tuple[tuple[str, str], ...],
        timeout_s: float | None,
    ) -> bytes | None:
        """The serialized response; None for a call that must go its own way. May raise
        ServiceError."""
        ...


MakeAttempts: TypeAlias = Callable[[float | None], Attempts]
"""What begins the tries of a call, given how many seconds they may take together."""


def single_response(
    rpc: Method,
    make_attempts: MakeAttempts,
    instruments: Instruments,
    carrier: CallCarrier | None = None,
) -> Callable[..., Awaitable[Any]]:
    """What a stub calls for an RPC that answers with one message."""
    peer = instruments.peer

    async def ask(
        replica: Replica, request: Any, metadata: tuple[tuple[str, str], ...], attempts: Attempts
    ) -> Any:
        """Raises ServiceError."""
        replica.begin()
        try:
            data = None
            if carrier is not None:
                data = await carrier.call(
                    replica, rpc.name, request, metadata, attempts.remaining_s()
                )
            if data is None:
                data = await rpc.start(
                    replica, request, timeout=attempts.remaining_s(), metadata=metadata
                )
            return rpc.from_bytes(data, peer)
        except grpc.RpcError as error:
            raise ServiceError.from_rpc_error(error, peer=peer) from None
        finally:
            replica.end()

    async def invoke(request: Any, *, timeout: float | None = None) -> Any:
        """Raises ServiceError. `timeout` is in seconds; the remaining deadline bounds it."""
        started = time.perf_counter()
        span = instruments.start(rpc.name)
        failure: BaseException | None = None
        try:
            attempts = make_attempts(deadline.bounded(timeout))
            metadata = metadata_of(span)
            if not rpc.streams_requests:
                request = rpc.to_bytes(request)
            while True:
                replica = None
                try:
                    replica = attempts.pick()
                    instruments.asked(span, replica)
                    return await ask(replica, request, metadata, attempts)
                except ServiceError as error:
                    # An iterator of requests cannot be gone through again.
                    if rpc.streams_requests and replica is not None:
                        raise
                    if not await attempts.may_go_on(error, replica):
                        raise
                    instruments.retried(span, replica, error)
        except BaseException as error:
            failure = error
            raise
        finally:
            instruments.end(rpc.name, span, started, failure)

    return invoke
