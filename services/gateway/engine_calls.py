"""Generations at the engines of one target: one shared stream to each replica, and each request at
the replica with the fewest."""

from __future__ import annotations

import asyncio
import itertools
import time
from collections.abc import Callable
from typing import Self

import grpc
from opentelemetry.trace import Span

from meshserve.v1 import engine_pb2
from services.gateway.engine_stream import EngineStream
from services.runtime import deadline
from services.runtime.attempts import Attempts
from services.runtime.client_calls import Instruments
from services.runtime.errors import Reason, ServiceError, from_session_status
from services.runtime.replicas import Eligible, Replica, ReplicaSet
from services.runtime.response_streams import ResponseStream
from services.runtime.telemetry.tracing import trace_context_of

GENERATE_METHOD = "meshserve.v1.EngineService/Generate"
PEER = "engine"


class EngineCalls:
    """Begins generations.

    Args:
        replicas: the engines.
        open_stream: opens a stream of generations to one of them.
        instruments: record each generation as a call of its own.
        max_message_bytes: largest message that an engine takes.
    """

    def __init__(
        self,
        replicas: ReplicaSet,
        open_stream: Callable[[Replica], ResponseStream],
        instruments: Instruments,
        max_message_bytes: int,
    ) -> None:
        self.replicas = replicas
        self.instruments = instruments
        self.max_message_bytes = max_message_bytes
        self.is_closed = False
        self._open_stream = open_stream
        self._streams: dict[Replica, EngineStream] = {}
        self._ids = itertools.count(1)

    def generate(
        self,
        request: engine_pb2.EngineServiceGenerateRequest,
        eligible: Eligible | None = None,
    ) -> EngineCall:
        """A generation, in the trace and under the deadline of the current task, at a replica that
        is eligible: by default at any.

        Raises:
            ServiceError: the deadline has passed, or the gateway shuts down.
        """
        return EngineCall(self, request, eligible)

    def next_session_id(self) -> int:
        """An id that no other generation of this process has."""
        return next(self._ids)

    def stream_to(self, replica: Replica) -> EngineStream:
        """The stream to a replica, opened where there is none. Raises ServiceError once this is
        closed."""
        if self.is_closed:
            raise ServiceError(Reason.DRAINING, "the replica is shutting down", retry_after_s=0.1)
        stream = self._streams.get(replica)
        if stream is None or stream.is_lost:
            self._streams = {
                other: each for other, each in self._streams.items() if not each.is_lost
            }
            stream = EngineStream(replica, self._open_stream(replica))
            self._streams[replica] = stream
        return stream

    def close(self) -> None:
        """Ends all streams."""
        self.is_closed = True
        for stream in self._streams.values():
            stream.close()


class EngineCall:
    """One generation: an async iterator over what the engine says. Exhaust it, or leave it."""

    def __init__(
        self,
        calls: EngineCalls,
        request: engine_pb2.EngineServiceGenerateRequest,
        eligible: Eligible | None = None,
    ) -> None:
        self._calls = calls
        self._started = time.perf_counter()
        self._attempts = Attempts(calls.replicas, PEER, deadline.bounded(None), eligible=eligible)
        self._replica: Replica | None = None
        self._stream: EngineStream | None = None
        self._session_id = 0
        self._accrued: list[engine_pb2.GenerationOutput] = []
        self._failure: ServiceError | None = None
        self._has_begun = False
        self._is_over = False
        self._waiter: asyncio.Future[None] | None = None
        self._expiry: asyncio.TimerHandle | None = None
        span = calls.instruments.start(GENERATE_METHOD)
        self._span: Span | None = span
        self._open = engine_pb2.GenerationOpen(request=request)
        self._open.trace.CopyFrom(trace_context_of(span))
        self._begin()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        self.cancel()

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> engine_pb2.GenerationOutput:
        while True:
            if self._accrued:
                output = self._next_output()
                self._has_begun = True
                return output
            if self._is_over:
                self._end(None)
                raise StopAsyncIteration
            if self._failure is not None:
                await self._begin_again(self._failure)
                continue
            self._waiter = asyncio.get_running_loop().create_future()
            try:
                await self._waiter
            finally:
                self._waiter = None

    def abort(self, indexes: list[int]) -> None:
        """Ends some choices, while the others go on."""
        if self._stream is not None:
            self._stream.abort(self._session_id, indexes)

    def cancel(self) -> None:
        """Gives the generation up, if it is not over."""
        if self._stream is not None:
            self._stream.cancel(self._session_id)
            self._stream = None
        self._end(None if self._is_over else GeneratorExit())

    def take(self, output: engine_pb2.GenerationOutput) -> None:
        """Called by the stream."""
        if output.HasField("error"):
            self._failure = from_session_status(output.error, peer=PEER)
        else:
            self._is_over = output.finished
        if output.chunk.deltas or output.completes:
            self._accrued.append(output)
        self._wake()

    def lose(self, error: ServiceError) -> None:
        """Called by the stream."""
        self._failure = error
        self._wake()

    def _next_output(self) -> engine_pb2.GenerationOutput:
        """All that has accrued, as one output."""
        first, *others = self._accrued
        self._accrued = []
        if others:
            deltas = {delta.index: delta for delta in first.chunk.deltas}
            for output in others:
                for delta in output.chunk.deltas:
                    if delta.index in deltas:
                        deltas[delta.index].MergeFrom(delta)
                    else:
                        deltas[delta.index] = first.chunk.deltas.add()
                        deltas[delta.index].CopyFrom(delta)
                first.completes.extend(output.completes)
        return first

    def _begin(self) -> None:
        """Opens the generation on a stream; that there is nobody is a failure like others. Raises
        ServiceError."""
        self._failure = self._replica = None
        try:
            self._open_at_next()
        except ServiceError as error:
            if error.code is not grpc.StatusCode.UNAVAILABLE or self._calls.is_closed:
                self._end(error)
                raise
            self._failure = error

    def _open_at_next(self) -> None:
        remaining_s = self._attempts.remaining_s()
        if remaining_s is not None:
            self._open.timeout_ms = max(1, round(remaining_s * 1000))
            if self._expiry is None:
                loop = asyncio.get_running_loop()
                self._expiry = loop.call_later(remaining_s, self._expire)
        self._session_id = self._calls.next_session_id()
        message = engine_pb2.GenerationInput(session_id=self._session_id, open=self._open)
        size_bytes, limit = message.ByteSize(), self._calls.max_message_bytes
        # On a shared stream it would take the others with it.
        if size_bytes > limit - 64:
            raise ServiceError(
                Reason.MESSAGE_TOO_LARGE,
                f"the request has {size_bytes} bytes; the engine takes {limit} at most",
                metadata={"service": PEER},
            )
        self._replica = self._attempts.pick()
        if self._span is not None:
            self._calls.instruments.asked(self._span, self._replica)
        self._stream = self._calls.stream_to(self._replica)
        self._stream.open(message, self)

    async def _begin_again(self, failure: ServiceError) -> None:
        """Tries another replica, where nothing has been heard of this one. Raises ServiceError."""
        if self._has_begun or not await self._attempts.may_go_on(failure, self._replica):
            self._end(failure)
            raise failure
        if self._span is not None:
            self._calls.instruments.retried(self._span, self._replica, failure)
        self._begin()

    def _expire(self) -> None:
        if self._stream is not None:
            self._stream.cancel(self._session_id)
        self._failure = ServiceError(
            Reason.DEADLINE_EXCEEDED, "the deadline passed", metadata={"service": PEER}
        )
        self._wake()

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    def _end(self, error: BaseException | None) -> None:
        """Records the end; does nothing the second time."""
        if self._expiry is not None:
            self._expiry.cancel()
        if self._span is not None:
            self._calls.instruments.end(GENERATE_METHOD, self._span, self._started, error)
            self._span = None
