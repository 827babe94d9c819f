"""Calls that are answered with a stream, the caller's side."""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
import time
from collections.abc import AsyncIterator, Callable
from functools import partial
from typing import Any, Self, cast

import grpc
from opentelemetry.sdk.trace.id_generator import RandomIdGenerator
from opentelemetry.trace import NonRecordingSpan, Span, SpanContext

from services.runtime import deadline
from services.runtime.attempts import Attempts
from services.runtime.client_calls import Instruments, MakeAttempts, Method
from services.runtime.errors import Reason, ServiceError
from services.runtime.replicas import Replica
from services.runtime.telemetry.tracing import metadata_of


def response_stream(
    rpc: Method, make_attempts: MakeAttempts, instruments: Instruments
) -> Callable[..., ResponseStream]:
    """What a stub calls for an RPC that answers with a stream."""

    def invoke(
        requests: Any = None, *, timeout: float | None = None, standing: bool = False
    ) -> ResponseStream:
        """A `standing` stream outlives the call it was opened in: it has no deadline, and no span
        on either side, since it belongs to no one request."""
        span = NonRecordingSpan(_unsampled()) if standing else instruments.start(rpc.name)
        started = time.perf_counter()
        try:
            limit_s = timeout if standing else deadline.bounded(timeout)
            if requests is not None and not rpc.streams_requests:
                requests = rpc.to_bytes(requests)
            attempts = make_attempts(limit_s)
            return ResponseStream(rpc, attempts, requests, span, instruments, is_standing=standing)
        except BaseException as error:
            instruments.end(rpc.name, span, started, error)
            raise

    return invoke


def standing(method: Any) -> ResponseStream:
    """Opens a stream that outlives the request that happens to need it first: in an empty context,
    so that it inherits neither the request's deadline nor its span."""
    return cast(ResponseStream, contextvars.Context().run(method, standing=True))


def _unsampled() -> SpanContext:
    """A context that tells the other side not to record."""
    ids = RandomIdGenerator()
    return SpanContext(ids.generate_trace_id(), ids.generate_span_id(), is_remote=False)


class ResponseStream:
    """Responses of a streaming call, as an async iterator that raises ServiceError.

    Exhaust it or cancel it; `async with` does the latter. One that is dropped in the middle is
    cancelled when it is collected.
    """

    def __init__(
        self,
        rpc: Method,
        attempts: Attempts,
        requests: Any,
        span: Span,
        instruments: Instruments,
        *,
        is_standing: bool,
    ) -> None:
        """Raises ServiceError if there is nobody to stream requests to."""
        # None once the call has ended.
        self._span: Span | None = None
        self._rpc = rpc
        self._attempts = attempts
        self._requests = requests
        self._metadata = metadata_of(span)
        self._instruments = instruments
        self._note_replica = partial(instruments.asked, span)
        self._started = time.perf_counter()
        # What a standing stream carries is counted at its replica, it itself is not.
        self._is_standing = is_standing
        self._has_begun = False
        self._replica: Replica | None = None
        self._call: Any = None
        self._messages: AsyncIterator[Any]
        try:
            self._open()
        except ServiceError:
            # One message can be sent later.
            if rpc.streams_requests:
                raise
        self._span = span

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
        while True:
            try:
                if self._call is None:
                    self._open()
                data = await anext(self._messages)
                self._has_begun = True
                return self._rpc.from_bytes(data, self._instruments.peer)
            except StopAsyncIteration:
                self._end(None)
                raise
            except grpc.RpcError as error:
                failure = ServiceError.from_rpc_error(error, peer=self._instruments.peer)
            except ServiceError as error:
                failure = error
            except BaseException as error:
                self._end(error)
                raise
            if not await self._may_go_on(failure):
                self._end(failure)
                raise failure

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
            self._end(GeneratorExit())

    def _open(self) -> None:
        """Raises ServiceError if there is nobody to call."""
        timeout_s = self._attempts.remaining_s()
        replica = self._attempts.pick()
        self._note_replica(replica)
        self._call = self._rpc.start(
            replica, self._requests, timeout=timeout_s, metadata=self._metadata
        )
        self._messages = aiter(self._call)
        if not self._is_standing:
            self._replica = replica
            replica.begin()

    async def _may_go_on(self, failure: ServiceError) -> bool:
        """Whether the call can be opened again: nothing has been heard of it, and all that was sent
        can be sent once more."""
        replica = self._replica
        self._release()
        if self._has_begun or self._rpc.streams_requests:
            return False
        self._call = None
        if not await self._attempts.may_go_on(failure, replica):
            return False
        if self._span is not None:
            self._instruments.retried(self._span, replica, failure)
        return True

    def _release(self) -> None:
        """The call under way is over."""
        if self._call is not None:
            self._call.cancel()
        if self._replica is not None:
            self._replica.end()
            self._replica = None

    def _end(self, error: BaseException | None) -> None:
        self._release()
        if self._span is not None:
            self._instruments.end(self._rpc.name, self._span, self._started, error)
            self._span = None
