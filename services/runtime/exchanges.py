"""Streams that many sessions share, the caller's side: what they have to say at one moment is one
message, and each gets its answers back. The answering side is in multiplex.py and call_host.py.
"""

from __future__ import annotations

import asyncio
import contextvars
import itertools
import logging
import time
from collections.abc import Callable, Collection, Iterable
from typing import Any, Generic, Protocol, TypeVar

from services.runtime.errors import Reason, ServiceError
from services.runtime.replicas import Replica, ReplicaSet
from services.runtime.response_streams import ResponseStream

log = logging.getLogger(__name__)

# For how long a stream that was lost is remembered.
LOST_MEMORY_S = 5.0
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
    """One stream to a replica: a task that writes what has accrued, one that hands out what comes
    back."""

    def __init__(
        self,
        replica: Replica,
        call: ResponseStream,
        make_request: Callable[[list[Input]], Any],
        outputs_of: Callable[[Any], Iterable[Output]],
    ) -> None:
        self.replica = replica
        self.lost = False
        self.lost_at = 0.0
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
        if not self.lost:
            self.lost_at = time.monotonic()
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
    """A stream to each replica of a service that has been needed.

    Args:
        peer: the service's name.
        replicas: of the service. What holds a session on a stream tells its replica so.
        open_stream: opens a stream to a replica.
    """

    def __init__(
        self,
        peer: str,
        replicas: ReplicaSet,
        *,
        open_stream: Callable[[Replica], ResponseStream],
        make_request: Callable[[list[Input]], Any],
        outputs_of: Callable[[Any], Iterable[Output]],
    ) -> None:
        self.peer = peer
        self.replicas = replicas
        self._open_stream = open_stream
        self._make_request: Callable[[list[Input]], Any] = make_request
        self._outputs_of: Callable[[Any], Iterable[Output]] = outputs_of
        self._streams: dict[Replica, ExchangeStream[Input, Output]] = {}
        self._ids = itertools.count(1)
        self._closed = False

    def new_session_id(self) -> int:
        """An id that no other session of this process has."""
        return next(self._ids)

    def stream(self, avoid: Collection[Replica] = ()) -> ExchangeStream[Input, Output] | None:
        """The stream to whoever is next, as ReplicaSet.pick says; None if there is nobody.

        Raises ServiceError once the pool is closed.
        """
        self._check_open()
        replica = self.replicas.pick(avoid)
        return None if replica is None else self.stream_to(replica)

    def stream_to(
        self, replica: Replica, reopen_after_s: float = 0.0
    ) -> ExchangeStream[Input, Output] | None:
        """The stream to a replica, opened where there is none; None if it was lost less than
        `reopen_after_s` ago.

        Raises ServiceError once the pool is closed.
        """
        self._check_open()
        stream = self._streams.get(replica)
        if stream is not None:
            if not stream.lost:
                return stream
            if time.monotonic() - stream.lost_at < reopen_after_s:
                return None
        self._sweep()
        call = self._open_stream(replica)
        stream = ExchangeStream(replica, call, self._make_request, self._outputs_of)
        self._streams[replica] = stream
        return stream

    def close(self) -> None:
        """Ends all streams; sessions that wait get ServiceError."""
        self._closed = True
        for stream in self._streams.values():
            stream.close()

    def _check_open(self) -> None:
        if self._closed:
            raise ServiceError(Reason.DRAINING, "the replica is shutting down", retry_after_s=0.1)

    def _sweep(self) -> None:
        long_ago = time.monotonic() - LOST_MEMORY_S
        self._streams = {
            replica: stream
            for replica, stream in self._streams.items()
            if not stream.lost or stream.lost_at > long_ago
        }
