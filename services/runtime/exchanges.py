"""Streams that many sessions share, the caller's side: what they have to say at one moment is one
message, and each gets its answers back. The answering side is in multiplex.py and call_host.py.
"""

from __future__ import annotations

import asyncio
import contextvars
import itertools
import logging
import time
from collections.abc import Callable, Iterable
from typing import Any, Generic, Protocol, TypeVar

from services.runtime.client_calls import ResponseStream
from services.runtime.errors import Reason, ServiceError

log = logging.getLogger(__name__)

# New sessions move to a new stream at this age, so that replicas that came later get their share.
MAX_STREAM_AGE_S = 30.0
# What has accrued goes in several messages above this size: sessions that resume together repeat
# what they hold, and one message of them all could be larger than the peer takes.
MAX_BATCH_BYTES = 2**20


class SessionInput(Protocol):
    """What the inputs of all such streams have in common."""

    session_id: int

    def ByteSize(self) -> int:  # noqa: N802 - protobuf's own name
        ...


class SessionOutput(Protocol):
    """What the outputs of all such streams have in common."""

    session_id: int


Input = TypeVar("Input", bound=SessionInput)
Output = TypeVar("Output", bound=SessionOutput)


def take_batch(accrued: list[Input]) -> list[Input]:
    """Removes what goes into one message: at most one input of each session, and not too many
    bytes."""
    size_bytes = 0
    sessions: set[int] = set()
    for message in accrued:
        size_bytes += message.ByteSize()
        if message.session_id in sessions or (sessions and size_bytes > MAX_BATCH_BYTES):
            break
        sessions.add(message.session_id)
    batch = accrued[: len(sessions)]
    del accrued[: len(sessions)]
    return batch


class StreamLostError(Exception):
    """The stream under a session ended; the session can go on, on another."""


class ExchangeStream(Generic[Input, Output]):
    """One stream: a task that writes what has accrued, one that hands out what comes back."""

    def __init__(
        self,
        call: ResponseStream,
        make_request: Callable[[list[Input]], Any],
        outputs_of: Callable[[Any], Iterable[Output]],
    ) -> None:
        self.opened_at = time.monotonic()
        self.lost = False
        self._call = call
        self._make_request: Callable[[list[Input]], Any] = make_request
        self._outputs_of: Callable[[Any], Iterable[Output]] = outputs_of
        self._accrued: list[Input] = []
        self._has_accrued = asyncio.Event()
        self._waiting: dict[int, asyncio.Future[Output]] = {}
        # The stream outlives the request that opened it, and so must not see its deadline or span.
        self._tasks = [
            asyncio.create_task(work, context=contextvars.Context())
            for work in (self._write(), self._read())
        ]

    @property
    def idle(self) -> bool:
        """Whether nobody waits for an answer."""
        return not self._waiting and not self._accrued

    def send(self, message: Input) -> None:
        """Puts a message under way; none is awaited in return."""
        self._accrued.append(message)
        self._has_accrued.set()

    async def exchange(self, session_id: int, message: Input, timeout_s: float | None) -> Output:
        """Sends one input and returns its output. Raises StreamLostError, or TimeoutError."""
        if self.lost:
            raise StreamLostError
        loop = asyncio.get_running_loop()
        future: asyncio.Future[Output] = loop.create_future()
        self._waiting[session_id] = future
        self.send(message)
        # asyncio.timeout costs more than all the rest of an exchange.
        expiry = None if timeout_s is None else loop.call_later(timeout_s, _expire, future)
        try:
            return await future
        finally:
            if expiry is not None:
                expiry.cancel()
            self._waiting.pop(session_id, None)

    def close(self) -> None:
        """Ends the stream; waiting sessions get StreamLostError."""
        self.lost = True
        for task in self._tasks:
            task.cancel()
        self._call.cancel()
        for future in self._waiting.values():
            if not future.done():
                future.set_exception(StreamLostError())

    async def _write(self) -> None:
        try:
            while True:
                await self._has_accrued.wait()
                self._has_accrued.clear()
                while batch := take_batch(self._accrued):
                    await self._call.write(self._make_request(batch))
        except ServiceError as error:
            log.info("session stream lost: %s", error.message)
        except Exception:
            log.exception("session stream failed")
        finally:
            # Whatever ended the writing, nobody may wait for answers that cannot come.
            self.close()

    async def _read(self) -> None:
        try:
            async for response in self._call:
                for output in self._outputs_of(response):
                    future = self._waiting.get(output.session_id)
                    if future is not None and not future.done():
                        future.set_result(output)
        except ServiceError as error:
            log.info("session stream lost: %s", error.message)
        except Exception:
            log.exception("session stream failed")
        finally:
            self.close()


def _expire(future: asyncio.Future[Any]) -> None:
    if not future.done():
        future.set_exception(TimeoutError())


class SessionPool(Generic[Input, Output]):
    """The current stream to one service, and those before it that still have sessions."""

    def __init__(
        self,
        peer: str,
        *,
        open_stream: Callable[[], ResponseStream],
        make_request: Callable[[list[Input]], Any],
        outputs_of: Callable[[Any], Iterable[Output]],
    ) -> None:
        self.peer = peer
        self._open_stream = open_stream
        self._make_request: Callable[[list[Input]], Any] = make_request
        self._outputs_of: Callable[[Any], Iterable[Output]] = outputs_of
        self._current: ExchangeStream[Input, Output] | None = None
        self._retired: list[ExchangeStream[Input, Output]] = []
        self._ids = itertools.count(1)
        self._closed = False

    def new_session_id(self) -> int:
        """An id that no other session of this process has."""
        return next(self._ids)

    def stream(self) -> ExchangeStream[Input, Output]:
        """The stream that new sessions use, opened when there is none or it is old.

        Raises ServiceError once the pool is closed.
        """
        if self._closed:
            raise ServiceError(Reason.DRAINING, "the replica is shutting down", retry_after_s=0.1)
        current = self._current
        if current is not None and not current.lost:
            if time.monotonic() - current.opened_at < MAX_STREAM_AGE_S:
                return current
            self._retired.append(current)
        self._sweep()
        call = self._open_stream()
        self._current = ExchangeStream(call, self._make_request, self._outputs_of)
        return self._current

    def discard(self, stream: ExchangeStream[Input, Output]) -> None:
        """Stops using a stream for new sessions: its replica is draining."""
        if stream is self._current:
            self._retired.append(stream)
            self._current = None

    def close(self) -> None:
        """Ends all streams; sessions that wait get ServiceError."""
        self._closed = True
        for stream in (*self._retired, *([self._current] if self._current else [])):
            stream.close()

    def _sweep(self) -> None:
        # A retired stream may hold sessions that wait for nothing at this moment; twice the age
        # is beyond the default deadline of a request between two tokens.
        now = time.monotonic()
        for stream in self._retired:
            if stream.idle and now - stream.opened_at > 2 * MAX_STREAM_AGE_S:
                stream.close()
        self._retired = [stream for stream in self._retired if not stream.lost]
