"""One stream to one engine replica, which carries many generations."""

from __future__ import annotations

import asyncio
import contextvars
import logging
from collections.abc import Callable
from typing import Protocol

from meshserve.v1 import engine_pb2
from services.runtime.client_calls import ResponseStream
from services.runtime.errors import Reason, ServiceError
from services.runtime.exchanges import take_batch

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
        call: the stream, just opened.
        on_replica: called once, when the replica has said who it is.
    """

    def __init__(self, call: ResponseStream, on_replica: Callable[[EngineStream], None]) -> None:
        self.replica_id = ""
        self.is_lost = False
        # Whether it takes no new generations; it ends with its last.
        self.is_retired = False
        # Done when the replica has said who it is, or never will.
        self.is_known = asyncio.Event()
        self._call = call
        self._on_replica = on_replica
        self._receivers: dict[int, Receiver] = {}
        self._accrued: list[engine_pb2.GenerationInput] = []
        self._has_accrued = asyncio.Event()
        # The stream outlives the request that opened it, and so must not see its deadline or span.
        self._tasks = [
            asyncio.create_task(work, context=contextvars.Context())
            for work in (self._write(), self._read())
        ]

    @property
    def load(self) -> int:
        """How many generations it carries."""
        return len(self._receivers)

    def open(self, message: engine_pb2.GenerationInput, receiver: Receiver) -> None:
        """Begins a generation. Precondition: the stream is not lost."""
        self._receivers[message.session_id] = receiver
        self._send(message)

    def abort(self, session_id: int, indexes: list[int]) -> None:
        """Ends some choices of a generation."""
        if session_id in self._receivers:
            self._send(engine_pb2.GenerationInput(session_id=session_id, abort_indexes=indexes))

    def cancel(self, session_id: int) -> None:
        """Gives a generation up, unless it is over."""
        if self._receivers.pop(session_id, None) is not None and not self.is_lost:
            self._send(engine_pb2.GenerationInput(session_id=session_id, cancel=True))

    def retire(self) -> None:
        """Takes no new generations from now on."""
        self.is_retired = True
        if not self._receivers:
            self.close()

    def close(self) -> None:
        """Ends the stream; its generations are lost."""
        self._lose(
            ServiceError(
                Reason.SERVICE_UNAVAILABLE,
                "the engine service cannot be reached",
                retry_after_s=1.0,
                metadata={"service": "engine"},
            )
        )

    def _send(self, message: engine_pb2.GenerationInput) -> None:
        self._accrued.append(message)
        self._has_accrued.set()

    def _lose(self, error: ServiceError) -> None:
        if self.is_lost:
            return
        self.is_lost = True
        self.is_known.set()
        for task in self._tasks:
            task.cancel()
        self._call.cancel()
        receivers, self._receivers = self._receivers, {}
        for receiver in receivers.values():
            receiver.lose(error)

    async def _write(self) -> None:
        try:
            while True:
                await self._has_accrued.wait()
                self._has_accrued.clear()
                while batch := take_batch(self._accrued):
                    await self._call.write(engine_pb2.GenerateManyRequest(inputs=batch))
                if self.is_retired and not self._receivers:
                    self.close()
        except ServiceError:
            # Why it ended is what reading says.
            return
        except Exception:
            log.exception("an engine stream failed")
            self.close()

    async def _read(self) -> None:
        try:
            async for response in self._call:
                if response.replica_id:
                    self.replica_id = response.replica_id
                    self._on_replica(self)
                    self.is_known.set()
                for output in response.outputs:
                    receivers = self._receivers
                    receiver = (
                        receivers.pop(output.session_id, None)
                        if output.finished
                        else receivers.get(output.session_id)
                    )
                    if receiver is not None:
                        receiver.take(output)
                if self.is_retired and not self._receivers:
                    break
        except ServiceError as error:
            log.info("an engine stream is lost: %s", error.message)
            self._lose(error)
        except Exception:
            log.exception("an engine stream failed")
        finally:
            self.close()
