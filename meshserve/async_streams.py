"""Streams of the asyncio client: asynchronous iterators that are also context managers."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from types import TracebackType
from typing import Self

import grpc

from meshserve.accumulators import Accumulator, ChunkT, ResponseT, ResultT
from meshserve.attempts import Attempts
from meshserve.streams import StreamState


class AsyncStream(StreamState[ResponseT, ChunkT, ResultT]):
    """An answer as it is generated: iterate over its chunks, or `collect` the rest of it.

    Closing the stream, leaving its `async with` block or cancelling the task that reads it
    cancels the request, and the server stops working on it. Used by one task at a time.
    """

    def __init__(
        self,
        attempts: Attempts,
        accumulator: Accumulator[ResponseT, ChunkT, ResultT],
        target: str,
    ) -> None:
        super().__init__(attempts, accumulator, target)
        self._messages: AsyncIterator[ResponseT] = self._call.__aiter__()

    def __aiter__(self) -> AsyncIterator[ChunkT]:
        return self

    async def __anext__(self) -> ChunkT:
        while not self._pending:
            if self._failure is not None:
                raise self._failure
            if self._ended:
                raise StopAsyncIteration
            await self._receive()
        return self._pending.popleft()

    async def aiter_text(self) -> AsyncIterator[str]:
        """Text of the first choice, piece by piece."""
        async for chunk in self:
            if chunk.index == 0 and chunk.text:
                yield chunk.text

    async def collect(self) -> ResultT:
        """Reads to the end and returns the whole answer, what was read before included."""
        async for _ in self:
            pass
        return self._accumulator.result()

    async def aclose(self) -> None:
        """Cancels the request if it is still running. May be called again."""
        self._cancel()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        await self.aclose()

    async def _receive(self) -> None:
        try:
            message = await anext(self._messages)
        except StopAsyncIteration:
            self._end()
        except grpc.RpcError as error:
            pause_s = self._pause_s(error)
            if pause_s is None:
                raise self._fail(error) from error
            await asyncio.sleep(pause_s)
            # Closed meanwhile, perhaps by another task.
            if self._failure is None:
                self._call = self._attempts.begin()
                self._messages = self._call.__aiter__()
        except asyncio.CancelledError:
            # Either our own close, seen by a reader in another task, or the reading task's own
            # cancellation, which is not ours to swallow.
            if self._failure is not None:
                raise self._failure from None
            self._cancel()
            raise
        else:
            self._take(message)
