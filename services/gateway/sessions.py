"""Many sessions on one bidirectional stream, the caller's side.

`SessionPool` keeps a long-lived stream to a service and puts what all sessions have to say at one
moment into one message. A stream that is lost is opened again and its sessions go on where they
were, since each can say what it had been answered; so a tokenizer or safety replica may die in the
middle of a completion without harm.
"""

from __future__ import annotations

import asyncio
import contextvars
import itertools
import logging
import time
from collections.abc import Callable
from typing import Any, Generic, TypeVar

from meshserve.v1 import safety_pb2, tokenizer_pb2
from services.runtime import deadline
from services.runtime.client_calls import ResponseStream
from services.runtime.errors import Reason, ServiceError, from_session_status

log = logging.getLogger(__name__)

# New sessions move to a new stream at this age, so that replicas that came later get their share.
MAX_STREAM_AGE_S = 30.0
# A session survives a lost stream this often in a row, which covers the restart of a replica.
MAX_REOPENINGS = 8
REOPEN_DELAY_S = 0.1
REOPEN_MAX_DELAY_S = 1.0
NO_DEADLINE_TIMEOUT_S = 60.0
# What has accrued goes in several messages above this size: sessions that resume together repeat
# what they hold, and one message of them all could be larger than the peer takes.
MAX_BATCH_BYTES = 2**20


Input = TypeVar("Input", tokenizer_pb2.DecodeInput, safety_pb2.CompletionInput)
Output = TypeVar("Output", tokenizer_pb2.DecodeOutput, safety_pb2.CompletionOutput)


class StreamLostError(Exception):
    """The stream under a session ended; the session can go on, on another."""


class _Stream(Generic[Input, Output]):
    """One stream: a task that writes what has accrued, one that hands out what comes back."""

    def __init__(
        self,
        call: ResponseStream,
        make_request: Callable[[list[Input]], Any],
        outputs_of: Callable[[Any], list[Output]],
    ) -> None:
        self.opened_at = time.monotonic()
        self.lost = False
        self._call = call
        self._make_request: Callable[[list[Input]], Any] = make_request
        self._outputs_of: Callable[[Any], list[Output]] = outputs_of
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

    async def exchange(self, session_id: int, message: Input, timeout_s: float) -> Output:
        """Sends one input and returns its output. Raises StreamLostError, or TimeoutError."""
        if self.lost:
            raise StreamLostError
        loop = asyncio.get_running_loop()
        future: asyncio.Future[Output] = loop.create_future()
        self._waiting[session_id] = future
        self.send(message)
        # asyncio.timeout costs more than all the rest of an exchange.
        expiry = loop.call_later(timeout_s, _expire, future)
        try:
            return await future
        finally:
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
                while batch := self._next_batch():
                    await self._call.write(self._make_request(batch))
        except ServiceError as error:
            log.info("session stream lost: %s", error.message)
        except Exception:
            log.exception("session stream failed")
        finally:
            # Whatever ended the writing, nobody may wait for answers that cannot come.
            self.close()

    def _next_batch(self) -> list[Input]:
        """The inputs of one message: at most one of each session, and not too many bytes."""
        size_bytes = 0
        sessions: set[int] = set()
        for message in self._accrued:
            size_bytes += message.ByteSize()
            if message.session_id in sessions or (sessions and size_bytes > MAX_BATCH_BYTES):
                break
            sessions.add(message.session_id)
        batch, self._accrued = self._accrued[: len(sessions)], self._accrued[len(sessions) :]
        return batch

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
    """Opens sessions on the current stream to one service."""

    def __init__(
        self,
        peer: str,
        *,
        open_stream: Callable[[], ResponseStream],
        make_request: Callable[[list[Input]], Any],
        outputs_of: Callable[[Any], list[Output]],
    ) -> None:
        self.peer = peer
        self._open_stream = open_stream
        self._make_request: Callable[[list[Input]], Any] = make_request
        self._outputs_of: Callable[[Any], list[Output]] = outputs_of
        self._current: _Stream[Input, Output] | None = None
        self._retired: list[_Stream[Input, Output]] = []
        self._ids = itertools.count(1)
        self._closed = False

    def new_session_id(self) -> int:
        """An id that no other session of this process has."""
        return next(self._ids)

    def stream(self) -> _Stream[Input, Output]:
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
        self._current = _Stream(call, self._make_request, self._outputs_of)
        return self._current

    def discard(self, stream: _Stream[Input, Output]) -> None:
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


class Session(Generic[Input, Output]):
    """One completion's side of a conversation with a multiplexed service.

    `make_input(session_id, payload, opening)` builds a message; with `opening` it carries what is
    needed to begin, or to go on after what has been answered. One exchange is under way at a time.
    """

    def __init__(
        self,
        pool: SessionPool[Input, Output],
        make_input: Callable[[int, Any, bool], Input],
        make_cancel: Callable[[int], Input],
    ) -> None:
        self._pool: SessionPool[Input, Output] = pool
        self._make_input: Callable[[int, Any, bool], Input] = make_input
        self._make_cancel: Callable[[int], Input] = make_cancel
        self._id = pool.new_session_id()
        self._stream: _Stream[Input, Output] | None = None
        self._over = False

    async def exchange(self, payload: Any) -> Output:
        """The answer to one input. Raises ServiceError, DEADLINE_EXCEEDED included."""
        remaining = deadline.remaining_s()
        try:
            output = await self._exchange(
                payload, NO_DEADLINE_TIMEOUT_S if remaining is None else remaining
            )
        except TimeoutError:
            self.cancel()
            raise ServiceError(
                Reason.DEADLINE_EXCEEDED,
                f"the {self._pool.peer} service did not answer in time",
                metadata={"service": self._pool.peer},
            ) from None
        self._over = output.finished
        return output

    def cancel(self) -> None:
        """Gives the session up, unless it is over."""
        if self._stream is not None and not self._stream.lost and not self._over:
            self._stream.send(self._make_cancel(self._id))
        self._over = True

    async def _exchange(self, payload: Any, timeout_s: float) -> Output:
        """Raises TimeoutError, and ServiceError."""
        give_up_at = time.monotonic() + timeout_s
        delay_s = REOPEN_DELAY_S
        for attempt in range(MAX_REOPENINGS + 1):
            opening = self._stream is None
            stream = self._stream or self._pool.stream()
            self._stream = stream
            try:
                output = await stream.exchange(
                    self._id, self._make_input(self._id, payload, opening), timeout_s
                )
            except StreamLostError:
                self._stream = None
                self._id = self._pool.new_session_id()
            else:
                if not output.HasField("error"):
                    return output
                error = from_session_status(output.error, peer=self._pool.peer)
                if error.reason is not Reason.DRAINING:
                    self._over = True
                    raise error
                self._pool.discard(stream)
                self._stream = None
            if 0 < attempt < MAX_REOPENINGS:
                await asyncio.sleep(min(delay_s, max(0.0, give_up_at - time.monotonic())))
                delay_s = min(2 * delay_s, REOPEN_MAX_DELAY_S)
            timeout_s = give_up_at - time.monotonic()
            if timeout_s <= 0:
                raise TimeoutError
        raise ServiceError(
            Reason.SERVICE_UNAVAILABLE,
            f"the {self._pool.peer} service cannot be reached",
            retry_after_s=1.0,
            metadata={"service": self._pool.peer},
        )
