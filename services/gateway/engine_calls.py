"""Generations at the engines of one target: one shared stream for each replica.

A channel balances calls over the replicas behind its target, and does not say which got one. The
engines say themselves who they are when a stream is opened; so streams are opened now and then to
see whether there is a replica that has none yet. A request goes to the stream with the fewest.
"""

from __future__ import annotations

import asyncio
import contextvars
import itertools
import random
import time
from collections.abc import Callable
from typing import Self

from opentelemetry.trace import Span

from meshserve.v1 import engine_pb2
from services.gateway.engine_stream import EngineStream
from services.runtime import deadline
from services.runtime.client_calls import Instruments, ResponseStream
from services.runtime.errors import Reason, ServiceError, from_session_status
from services.runtime.telemetry.tracing import trace_context_of

GENERATE_METHOD = "meshserve.v1.EngineService/Generate"
PEER = "engine"
# How long after the last look another is taken for replicas that have no stream yet.
LOOK_OUT_INTERVAL_S = 2.0
HELLO_TIMEOUT_S = 2.0
# As for calls that have a channel to themselves (services/runtime/channels.py).
MAX_ATTEMPTS = 4
FIRST_RETRY_DELAY_S = 0.05
LONGEST_RETRY_DELAY_S = 0.5


class EngineCalls:
    """Begins generations.

    Args:
        open_stream: opens a stream of generations to some replica.
        instruments: record each generation as a call of its own.
        max_message_bytes: largest message that an engine takes.
    """

    def __init__(
        self,
        open_stream: Callable[[], ResponseStream],
        instruments: Instruments,
        max_message_bytes: int,
    ) -> None:
        self.instruments = instruments
        self.max_message_bytes = max_message_bytes
        self._open_stream = open_stream
        self._streams: list[EngineStream] = []
        self._ids = itertools.count(1)
        self._closed = False
        self._is_used = asyncio.Event()
        self._look_out: asyncio.Task[None] | None = None

    def generate(self, request: engine_pb2.EngineServiceGenerateRequest) -> EngineCall:
        """A generation, in the trace and under the deadline of the current task.

        Raises:
            ServiceError: the deadline has passed, or the gateway shuts down.
        """
        return EngineCall(self, request)

    def next_session_id(self) -> int:
        """An id that no other generation of this process has."""
        return next(self._ids)

    def stream(self, avoid: list[EngineStream]) -> EngineStream:
        """The stream with the fewest generations, but none of `avoid`. Raises ServiceError."""
        if self._closed:
            raise ServiceError(Reason.DRAINING, "the replica is shutting down", retry_after_s=0.1)
        self._is_used.set()
        if self._look_out is None:
            self._look_out = asyncio.create_task(
                self._find_replicas(), context=contextvars.Context()
            )
        usable = [stream for stream in self._live() if stream not in avoid]
        if not usable:
            return self._open()
        # Of those with as many, the one that has waited longest.
        chosen = min(usable, key=lambda stream: stream.load)
        self._streams.remove(chosen)
        self._streams.append(chosen)
        return chosen

    def close(self) -> None:
        """Ends all streams."""
        self._closed = True
        if self._look_out is not None:
            self._look_out.cancel()
        for stream in self._streams:
            stream.close()

    def _live(self) -> list[EngineStream]:
        self._streams = [stream for stream in self._streams if not stream.is_lost]
        return [stream for stream in self._streams if not stream.is_retired]

    def _open(self) -> EngineStream:
        stream = EngineStream(self._open_stream(), self._retire_duplicates)
        self._streams.append(stream)
        return stream

    def _retire_duplicates(self, stream: EngineStream) -> None:
        """Of two streams to one replica the younger takes nothing more."""
        if any(
            other is not stream and other.replica_id == stream.replica_id for other in self._live()
        ):
            stream.retire()

    async def _find_replicas(self) -> None:
        while True:
            await self._is_used.wait()
            self._is_used.clear()
            # Each new stream goes to the replica after the last one's, as far as the channel has
            # reached them: as many in a row as are known, and none of them new, is once round.
            known_in_a_row = 0
            while known_in_a_row < max(1, len(self._live())):
                known_in_a_row = 0 if await self._finds_one() else known_in_a_row + 1
            await asyncio.sleep(LOOK_OUT_INTERVAL_S)

    async def _finds_one(self) -> bool:
        """Opens a stream, and keeps it if it is the first to its replica."""
        # Carries nothing until it is known where it goes.
        stream = EngineStream(self._open_stream(), lambda _: None)
        try:
            async with asyncio.timeout(HELLO_TIMEOUT_S):
                await stream.is_known.wait()
        except TimeoutError:
            pass
        except asyncio.CancelledError:
            stream.close()
            raise
        known = {other.replica_id for other in self._live()}
        if stream.is_lost or not stream.replica_id or stream.replica_id in known:
            stream.close()
            return False
        self._streams.append(stream)
        return True


class EngineCall:
    """One generation: an async iterator over what the engine says. Exhaust it, or leave it."""

    def __init__(
        self, calls: EngineCalls, request: engine_pb2.EngineServiceGenerateRequest
    ) -> None:
        self._calls = calls
        self._started = time.perf_counter()
        self._stream: EngineStream | None = None
        self._tried: list[EngineStream] = []
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
        try:
            self._begin()
        except ServiceError as error:
            self._end(error)
            raise

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
        """Opens the generation on a stream. Raises ServiceError."""
        remaining_s = deadline.bounded(None)
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
        self._failure = None
        self._stream = self._calls.stream(self._tried)
        self._tried.append(self._stream)
        self._stream.open(message, self)

    async def _begin_again(self, failure: ServiceError) -> None:
        """Tries another replica, where nothing has been heard of this one. Raises ServiceError."""
        is_final = (
            self._has_begun
            or failure.code.name != "UNAVAILABLE"
            or len(self._tried) == MAX_ATTEMPTS
        )
        if is_final:
            self._end(failure)
            raise failure
        delay_s = min(FIRST_RETRY_DELAY_S * 2 ** (len(self._tried) - 1), LONGEST_RETRY_DELAY_S)
        await asyncio.sleep(delay_s * random.uniform(0.8, 1.2))
        try:
            self._begin()
        except ServiceError as error:
            self._end(error)
            raise

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
