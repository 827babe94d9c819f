"""Streams of the synchronous client: iterators that are also context managers."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterator
from types import TracebackType
from typing import Generic, Self

import grpc

from meshserve.accumulators import Accumulator, ChunkT, ResponseT, ResultT
from meshserve.attempts import Attempts
from meshserve.errors import MeshServeError, RequestCancelledError
from meshserve.types import Usage
from meshserve.wire.statuses import error_from_rpc


class StreamState(Generic[ResponseT, ChunkT, ResultT]):
    """What a stream knows so far; shared by both kinds of stream."""

    def __init__(
        self,
        attempts: Attempts,
        accumulator: Accumulator[ResponseT, ChunkT, ResultT],
        target: str,
    ) -> None:
        self._attempts = attempts
        self._call = attempts.begin()
        self._accumulator = accumulator
        self._target = target
        self._pending: deque[ChunkT] = deque()
        self._failure: MeshServeError | None = None
        self._ended = False
        self._has_begun = False

    @property
    def text(self) -> str:
        """Text of the first choice so far."""
        return self._accumulator.text_of(0)

    @property
    def request_id(self) -> str:
        """Names the request; empty until the server has answered, unless chosen by the caller."""
        return self._accumulator.request_id

    @property
    def model(self) -> str:
        """The model that answers; empty until the server has answered."""
        return self._accumulator.model

    @property
    def prompt_tokens(self) -> int | None:
        """Tokens of the prompt; None until known."""
        return self._accumulator.prompt_tokens

    @property
    def usage(self) -> Usage:
        """Tokens of the choices that have ended so far."""
        return self._accumulator.usage

    @property
    def cached(self) -> bool:
        """Whether the answer came from the response cache; known at the end."""
        return self._accumulator.cached

    def _take(self, message: ResponseT) -> None:
        self._has_begun = True
        try:
            self._pending.extend(self._accumulator.feed(message))
        except MeshServeError as error:
            self._failure = error
            self._call.cancel()
            raise

    def _end(self) -> None:
        self._ended = True
        try:
            self._accumulator.check_complete()
        except MeshServeError as error:
            self._failure = error
            raise

    def _pause_s(self, error: grpc.RpcError) -> float | None:
        """How long to wait before asking again; None if the failure is to stand."""
        return None if self._has_begun or self._failure else self._attempts.pause_s(error)

    def _fail(self, error: grpc.RpcError) -> MeshServeError:
        if self._failure is None:
            self._failure = error_from_rpc(error, target=self._target, request_id=self.request_id)
        return self._failure

    def _cancel(self) -> None:
        """Ends the request if it is still running."""
        if self._ended or self._failure is not None:
            return
        self._failure = RequestCancelledError(
            "the stream was closed before its end",
            code=grpc.StatusCode.CANCELLED,
            request_id=self.request_id,
        )
        self._pending.clear()
        self._call.cancel()


class Stream(StreamState[ResponseT, ChunkT, ResultT]):
    """An answer as it is generated: iterate over its chunks, or `collect` the rest of it.

    Closing the stream, or leaving its `with` block, before the end cancels the request, and the
    server stops working on it. Used by one thread at a time.
    """

    def __init__(
        self,
        attempts: Attempts,
        accumulator: Accumulator[ResponseT, ChunkT, ResultT],
        target: str,
    ) -> None:
        super().__init__(attempts, accumulator, target)
        self._messages: Iterator[ResponseT] = iter(self._call)

    def __iter__(self) -> Iterator[ChunkT]:
        return self

    def __next__(self) -> ChunkT:
        while not self._pending:
            if self._failure is not None:
                raise self._failure
            if self._ended:
                raise StopIteration
            self._receive()
        return self._pending.popleft()

    def iter_text(self) -> Iterator[str]:
        """Text of the first choice, piece by piece."""
        for chunk in self:
            if chunk.index == 0 and chunk.text:
                yield chunk.text

    def collect(self) -> ResultT:
        """Reads to the end and returns the whole answer, what was read before included."""
        for _ in self:
            pass
        return self._accumulator.result()

    def close(self) -> None:
        """Cancels the request if it is still running. May be called again."""
        self._cancel()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def _receive(self) -> None:
        try:
            message = next(self._messages)
        except StopIteration:
            self._end()
        except grpc.RpcError as error:
            pause_s = self._pause_s(error)
            if pause_s is None:
                raise self._fail(error) from error
            time.sleep(pause_s)
            self._call = self._attempts.begin()
            self._messages = iter(self._call)
        else:
            self._take(message)
