"""Channels to other services: balancing, keepalive, retry, trace, deadline and errors in one place.

`connect` returns a channel that generated stubs take. Its calls pass on the trace context and the
remaining deadline, raise ServiceError instead of AioRpcError, and leave a client span and metrics
whatever their shape.
"""

from __future__ import annotations

import json
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from typing import Any, Self, cast

import grpc
from opentelemetry.sdk.trace import RandomIdGenerator
from opentelemetry.trace import (
    NonRecordingSpan,
    Span,
    SpanContext,
    SpanKind,
    Status,
    StatusCode,
    use_span,
)

from services.runtime import deadline
from services.runtime.errors import ServiceError
from services.runtime.telemetry import Metrics, get_tracer
from services.runtime.telemetry.tracing import inject_context

KEEPALIVE_TIME_MS = 20_000
KEEPALIVE_TIMEOUT_MS = 5_000


def channel_options(grpc_services: Sequence[str], max_message_bytes: int) -> list[tuple[str, Any]]:
    """gRPC channel arguments for a target that stands for any number of replicas.

    Calls are balanced over all addresses of the name, those that say NOT_SERVING are passed over,
    and UNAVAILABLE (no other code: nothing else is known to be without effect) is tried again
    before the first message of an answer.
    """
    service_config: dict[str, Any] = {
        "loadBalancingConfig": [{"round_robin": {}}],
        "methodConfig": [
            {
                "name": [{"service": service} for service in grpc_services],
                "retryPolicy": {
                    "maxAttempts": 4,
                    "initialBackoff": "0.05s",
                    "maxBackoff": "0.5s",
                    "backoffMultiplier": 2,
                    "retryableStatusCodes": ["UNAVAILABLE"],
                },
            }
        ],
    }
    if grpc_services:
        service_config["healthCheckConfig"] = {"serviceName": grpc_services[0]}
    return [
        ("grpc.service_config", json.dumps(service_config)),
        ("grpc.enable_retries", 1),
        ("grpc.max_receive_message_length", max_message_bytes),
        ("grpc.max_send_message_length", max_message_bytes),
        ("grpc.keepalive_time_ms", KEEPALIVE_TIME_MS),
        ("grpc.keepalive_timeout_ms", KEEPALIVE_TIMEOUT_MS),
        ("grpc.keepalive_permit_without_calls", 1),
        ("grpc.http2.max_pings_without_data", 0),
        # A killed replica is back within a second or two; the defaults would wait for minutes.
        ("grpc.initial_reconnect_backoff_ms", 100),
        ("grpc.min_reconnect_backoff_ms", 100),
        ("grpc.max_reconnect_backoff_ms", 1_000),
        ("grpc.dns_min_time_between_resolutions_ms", 1_000),
        # Replicas are told apart by their channels; a shared pool would tie services together.
        ("grpc.use_local_subchannel_pool", 1),
    ]


def connect(
    target: str,
    *,
    peer: str,
    grpc_services: Sequence[str],
    metrics: Metrics,
    max_message_bytes: int = 64 * 2**20,
    credentials: grpc.ChannelCredentials | None = None,
) -> grpc.aio.Channel:
    """A channel to the service named `peer` at a gRPC target such as `dns:///tokenizer:50052`.

    `grpc_services` are the full names of what is called; the health of the first one decides
    whether a replica is used.
    """
    options = channel_options(grpc_services, max_message_bytes)
    channel = (
        grpc.aio.insecure_channel(target, options=options)
        if credentials is None
        else grpc.aio.secure_channel(target, credentials, options=options)
    )
    return cast(grpc.aio.Channel, MeshChannel(channel, peer, target, metrics))


class MeshChannel:
    """Stands in for grpc.aio.Channel in generated stubs. Close it with `async with` or `close`."""

    def __init__(self, channel: grpc.aio.Channel, peer: str, target: str, metrics: Metrics) -> None:
        self._channel = channel
        self._instruments = _Instruments(peer, target, metrics)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    async def close(self) -> None:
        """Cancels what is in flight and closes the connections."""
        await self._channel.close(None)

    def unary_unary(self, method: str, *serializers: Any, **kwargs: Any) -> Any:
        """Called by generated stubs."""
        call = self._channel.unary_unary(method, *serializers, **kwargs)
        return _single_response(call, method.removeprefix("/"), self._instruments)

    def stream_unary(self, method: str, *serializers: Any, **kwargs: Any) -> Any:
        """Called by generated stubs."""
        call = self._channel.stream_unary(method, *serializers, **kwargs)
        return _single_response(call, method.removeprefix("/"), self._instruments)

    def unary_stream(self, method: str, *serializers: Any, **kwargs: Any) -> Any:
        """Called by generated stubs."""
        call = self._channel.unary_stream(method, *serializers, **kwargs)
        return _response_stream(call, method.removeprefix("/"), self._instruments)

    def stream_stream(self, method: str, *serializers: Any, **kwargs: Any) -> Any:
        """Called by generated stubs."""
        call = self._channel.stream_stream(method, *serializers, **kwargs)
        return _response_stream(call, method.removeprefix("/"), self._instruments)


class _Instruments:
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
        if error is None:
            code = "OK"
        else:
            known = isinstance(error, ServiceError)
            code = error.code.name if known else grpc.StatusCode.CANCELLED.name  # type: ignore[attr-defined]
            kind = error.reason.value if known else code  # type: ignore[attr-defined]
            span.set_attribute("error.type", kind)
            span.set_status(Status(StatusCode.ERROR, kind))
        span.set_attribute("rpc.response.status_code", code)
        span.end()
        self._calls.labels(method, code).inc()
        self._duration.labels(method).observe(time.perf_counter() - started)


def _outgoing(span: Span) -> tuple[tuple[str, str], ...]:
    carrier: dict[str, str] = {}
    with use_span(span):
        inject_context(carrier)
    return tuple(carrier.items())


def _single_response(
    call: Callable[..., Awaitable[Any]], method: str, instruments: _Instruments
) -> Callable[..., Awaitable[Any]]:
    async def invoke(request: Any, *, timeout: float | None = None) -> Any:
        """Raises ServiceError. `timeout` is in seconds; the remaining deadline bounds it."""
        started = time.perf_counter()
        span = instruments.start(method)
        failure: BaseException | None = None
        try:
            return await call(request, timeout=deadline.bounded(timeout), metadata=_outgoing(span))
        except grpc.RpcError as error:
            failure = ServiceError.from_rpc_error(error, peer=instruments.peer)
            raise failure from None
        except BaseException as error:
            failure = error
            raise
        finally:
            instruments.end(method, span, started, failure)

    return invoke


def _response_stream(
    call: Callable[..., Any], method: str, instruments: _Instruments
) -> Callable[..., ResponseStream]:
    def invoke(
        requests: Any = None, *, timeout: float | None = None, standing: bool = False
    ) -> ResponseStream:
        """A `standing` stream outlives the call it was opened in: it has no deadline, and no span
        on either side, since it belongs to no one request."""
        span = NonRecordingSpan(_unsampled()) if standing else instruments.start(method)
        limit = timeout if standing else deadline.bounded(timeout)
        return ResponseStream(
            call(requests, timeout=limit, metadata=_outgoing(span)), method, span, instruments
        )

    return invoke


def _unsampled() -> SpanContext:
    """A context that tells the other side not to record."""
    ids = RandomIdGenerator()
    return SpanContext(ids.generate_trace_id(), ids.generate_span_id(), is_remote=False)


class ResponseStream:
    """Responses of a streaming call, as an async iterator that raises ServiceError.

    It must be exhausted or cancelled; `async with` does the latter.
    """

    def __init__(self, call: Any, method: str, span: Span, instruments: _Instruments) -> None:
        self._call = call
        self._method = method
        self._span: Span | None = span
        self._instruments = instruments
        self._started = time.perf_counter()
        self._messages: AsyncIterator[Any] = aiter(call)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        self.cancel()

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> Any:
        try:
            return await anext(self._messages)
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
        """Sends one request of a bidirectional call; returns once the transport took it."""
        try:
            await self._call.write(request)
        except grpc.RpcError as error:
            raise ServiceError.from_rpc_error(error, peer=self._instruments.peer) from None

    async def done_writing(self) -> None:
        """Says that no more requests follow."""
        await self._call.done_writing()

    def cancel(self) -> None:
        """Ends the call if it has not ended."""
        if self._span is not None:
            self._call.cancel()
            self._end(GeneratorExit())

    def _end(self, error: BaseException | None) -> None:
        if self._span is not None:
            self._instruments.end(self._method, self._span, self._started, error)
            self._span = None
