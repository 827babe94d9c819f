"""Talks to `peers/openvino_server.py`: many requests over one connection, a line of JSON each."""

from __future__ import annotations

import asyncio
import itertools
import json
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

from benchmarks.load import BenchmarkError
from benchmarks.systems.server_process import ClientFactory, NotServingError
from benchmarks.workloads import Request

MAX_LINE_BYTES = 1 << 20


class LineClient:
    """A client over one open connection."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader = reader
        self._writer = writer
        self._ids = itertools.count()
        self._open: dict[int, tuple[Callable[[], None], asyncio.Future[int]]] = {}

    async def generate(self, request: Request, arrived: Callable[[], None]) -> int:
        """See `load.Client`."""
        identity = next(self._ids)
        done: asyncio.Future[int] = asyncio.get_running_loop().create_future()
        self._open[identity] = (arrived, done)
        message = {
            "id": identity,
            "prompt_token_ids": request.prompt_token_ids,
            "max_tokens": request.output_tokens,
        }
        self._writer.write(json.dumps(message).encode() + b"\n")
        return await done

    async def read(self) -> None:
        """Hands every line to the request it is for, until the connection ends."""
        while line := await self._reader.readline():
            message = json.loads(line)
            arrived, done = self._open[message["id"]]
            if "tokens" in message:
                arrived()
            else:
                del self._open[message["id"]]
                done.set_result(message["done"])
        for _, done in self._open.values():
            done.set_exception(BenchmarkError("the server closed the connection"))


def openvino_clients(port: int) -> ClientFactory:
    """Makes clients of a server on this machine."""

    @asynccontextmanager
    async def open_client() -> AsyncIterator[LineClient]:
        try:
            reader, writer = await asyncio.open_connection("127.0.0.1", port, limit=MAX_LINE_BYTES)
        except OSError as error:
            raise NotServingError(str(error)) from error
        client = LineClient(reader, writer)
        reading = asyncio.create_task(client.read())
        try:
            yield client
        finally:
            writer.close()
            reading.cancel()

    return open_client
