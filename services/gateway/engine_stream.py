"""One stream to one engine replica, which carries many generations."""

from __future__ import annotations

import asyncio
import contextvars
import logging
from typing import Protocol

from meshserve.v1 import engine_pb2
from services.runtime.attempts import unreachable
from services.runtime.errors import ServiceError
from services.runtime.exchanges import take_batch
from services.runtime.replicas import Replica
from services.runtime.response_streams import ResponseStream

log = logging.getLogger(__name__)


class Receiver(Protocol):
    """Who gets what the replica says of one generation. Neither method may block or raise."""

    def take(self, output: engine_pb2.GenerationOutput) -> None:
        """Something was said."""
        ...

    def lose(self, error: ServiceError) -> None:
        """The stream has ended, and the generation with it."""
        ...


class EngineStream:
    """Writes what has accrued in one message, and hands out what comes back.

    Args:
        replica: is told of each generation.
        call: the stream to it, just opened.
    """

    def __init__(self, replica: Replica, call: ResponseStream) -> None:
        self.replica = replica
        self.is_lost = False
        self._call = call
        self._receivers: dict[int, Receiver] = {}
        self._accrued: list[engine_pb2.GenerationInput] = []
        self._has_accrued = asyncio.Event()
        # The stream outlives the request that opened it, and so must not see its deadline or span.
        self._tasks = [
            asyncio.create_task(work, context=contextvars.Context())
            for work in (self._write(), self._read())
        ]

    def open(self, message: engine_pb2.GenerationInput, receiver: Receiver) -> None:
        """Begins a generation. Precondition: the stream is not lost."""
        self._receivers[message.session_id] = receiver
        self.replica.begin()
        self._send(message)

    def abort(self, session_id: int, indexes: list[int]) -> None:
        """Ends some choices of a generation."""
        if session_id in self._receivers:
            self._send(engine_pb2.GenerationInput(session_id=session_id, abort_indexes=indexes))

    def cancel(self, session_id: int) -> None:
        """Gives a generation up, unless it is over."""
        if self._take(session_id) is not None:
            self._send(engine_pb2.GenerationInput(session_id=session_id, cancel=True))

    def close(self) -> None:
        """Ends the stream; its generations are lost."""
        self._lose(unreachable("engine"))

    def _take(self, session_id: int) -> Receiver | None:
        """The receiver of a generation that is over with this; None if it was."""
        receiver = self._receivers.pop(session_id, None)
        if receiver is not None:
            self.replica.end()
        return receiver

    def _send(self, message: engine_pb2.GenerationInput) -> None:
        self._accrued.append(message)
        self._has_accrued.set()

    def _lose(self, error: ServiceError) -> None:
        if self.is_lost:
            return
        self.is_lost = True
        for task in self._tasks:
            task.cancel()
        self._call.cancel()
        receivers, self._receivers = self._receivers, {}
        for receiver in receivers.values():
            self.replica.end()
            receiver.lose(error)

    async def _write(self) -> None:
        try:
            while True:
                await self._has_accrued.wait()
                self._has_accrued.clear()
                while batch := take_batch(self._accrued):
                    await self._call.write(engine_pb2.GenerateManyRequest(inputs=batch))
        except ServiceError:
            # Why it ended is what reading says.
            return
        except Exception:
            log.exception("an engine stream failed")
            self.close()

    async def _read(self) -> None:
        try:
            async for response in self._call:
                for output in response.outputs:
                    session_id = output.session_id
                    receiver = (
                        self._take(session_id)
                        if output.finished
                        else self._receivers.get(session_id)
                    )
                    if receiver is not None:
                        receiver.take(output)
        except ServiceError as error:
            log.info("an engine stream is lost: %s", error.message)
            self._lose(error)
        except Exception:
            log.exception("an engine stream failed")
        finally:
            self.close()
