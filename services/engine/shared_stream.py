"""Many generations on one stream: what all of them have to say at one moment is one message."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Sequence

from meshserve.v1 import engine_pb2
from services.engine.generation import Generation, Generations
from services.runtime.carried_calls import CarriedCall, CarriedCalls
from services.runtime.errors import Reason, ServiceError, invalid_field, to_session_status

log = logging.getLogger(__name__)

MAX_SESSIONS = 4096
# What has accrued goes in several messages above this size: log-probabilities take much room.
MAX_MESSAGE_BYTES = 2**20


class SharedStream:
    """One caller's stream of generations.

    Args:
        generations: begins requests.
        calls: records each of them as a call of its own.
        draining: once set the stream ends with its last generation.
        replica_id: names this process.
    """

    def __init__(
        self,
        generations: Generations,
        calls: CarriedCalls,
        draining: asyncio.Event,
        replica_id: str,
    ) -> None:
        self._generations = generations
        self._calls = calls
        self._draining = draining
        self._replica_id = replica_id
        self._sessions: dict[int, _Session] = {}
        # In the order in which they became due; an entry stands for one look at its session.
        self._due: dict[int, _Session] = {}
        self._refused: list[engine_pb2.GenerationOutput] = []
        self._something = asyncio.Event()

    async def serve(
        self, requests: AsyncIterator[engine_pb2.GenerateManyRequest]
    ) -> AsyncGenerator[engine_pb2.GenerateManyResponse]:
        """Yields messages until the caller is done, or the last generation of a replica that drains
        has ended. Leaving it ends all generations."""
        yield engine_pb2.GenerateManyResponse(replica_id=self._replica_id)
        reading = asyncio.create_task(self._read(requests))
        drain = asyncio.create_task(self._draining.wait())
        for task in (reading, drain):
            task.add_done_callback(lambda _: self._something.set())
        try:
            while True:
                await self._something.wait()
                self._something.clear()
                while self._due or self._refused:
                    yield self._message()
                if reading.done():
                    await reading
                    return
                if drain.done() and not self._sessions:
                    return
        finally:
            for task in (reading, drain):
                task.cancel()
            for session in list(self._sessions.values()):
                session.close(ServiceError(Reason.CANCELLED, "the stream ended"))

    async def _read(self, requests: AsyncIterator[engine_pb2.GenerateManyRequest]) -> None:
        async for request in requests:
            for message in request.inputs:
                try:
                    self._take(message)
                except ServiceError as error:
                    self._refuse(message.session_id, error)
                except Exception:
                    log.exception("a generation failed")
                    self._refuse(message.session_id, _defect())

    def _take(self, message: engine_pb2.GenerationInput) -> None:
        session_id = message.session_id
        session = self._sessions.get(session_id)
        if message.HasField("open"):
            if session is not None:
                raise invalid_field("inputs.open", f"generation {session_id} is open already")
            self._open(message)
        elif session is None:
            # It may just have ended by itself.
            return
        elif message.cancel:
            session.close(ServiceError(Reason.CANCELLED, "the caller gave it up"))
        elif message.abort_indexes:
            session.withdraw(message.abort_indexes)

    def _open(self, message: engine_pb2.GenerationInput) -> None:
        given = message.open
        call = self._calls.begin(given.trace)
        try:
            if len(self._sessions) >= MAX_SESSIONS:
                raise ServiceError(
                    Reason.QUEUE_FULL,
                    f"the stream holds {MAX_SESSIONS} generations already",
                    retry_after_s=1.0,
                )
            session = _Session(message.session_id, call, self._closed)
            if self._generations.model_of(given.request).is_asleep:
                session.wait(asyncio.create_task(self._wake(session, given.request)))
            else:
                self._begin(session, given.request)
        except ServiceError as error:
            call.end(error)
            raise
        except BaseException:
            call.end(ServiceError(Reason.INTERNAL, "internal error"))
            raise
        self._sessions[message.session_id] = session
        if given.HasField("timeout_ms"):
            session.expire_after(given.timeout_ms / 1000, self._become_due)

    def _begin(self, session: _Session, request: engine_pb2.EngineServiceGenerateRequest) -> None:
        generation = self._generations.begin(request, session.call.context)
        generation.stream.on_due = lambda: self._become_due(session)
        session.begin(generation)

    async def _wake(
        self, session: _Session, request: engine_pb2.EngineServiceGenerateRequest
    ) -> None:
        try:
            await self._generations.wake(request)
            self._begin(session, request)
        except ServiceError as error:
            session.failure = error
            self._become_due(session)
        except Exception:
            log.exception("a generation failed")
            session.failure = _defect()
            self._become_due(session)

    def _become_due(self, session: _Session) -> None:
        if session.session_id in self._sessions:
            self._due[session.session_id] = session
            self._something.set()

    def _closed(self, session: _Session) -> None:
        self._sessions.pop(session.session_id, None)
        self._due.pop(session.session_id, None)

    def _refuse(self, session_id: int, error: ServiceError) -> None:
        self._refused.append(_failed(session_id, error))
        self._something.set()

    def _message(self) -> engine_pb2.GenerateManyResponse:
        message = engine_pb2.GenerateManyResponse(outputs=self._refused)
        self._refused.clear()
        size_bytes = 0
        while self._due and size_bytes < MAX_MESSAGE_BYTES:
            session = self._due.pop(next(iter(self._due)))
            output = message.outputs.add(session_id=session.session_id)
            session.collect(output)
            size_bytes += output.ByteSize()
        return message


class _Session:
    """One generation of the stream.

    Attributes:
        failure: why it could not begin, once that is known.
    """

    def __init__(
        self, session_id: int, call: CarriedCall, on_close: Callable[[_Session], None]
    ) -> None:
        self.session_id = session_id
        self.call = call
        self.failure: ServiceError | None = None
        self._generation: Generation | None = None  # none yet: its model is being woken
        self._waking: asyncio.Task[None] | None = None
        self._withdrawn: list[int] = []  # before it began
        self._on_close = on_close
        self._expiry: asyncio.TimerHandle | None = None
        self._has_expired = False

    def wait(self, waking: asyncio.Task[None]) -> None:
        """It begins once its model is awake."""
        self._waking = waking

    def begin(self, generation: Generation) -> None:
        """It begins."""
        self._generation = generation
        if self._withdrawn:
            generation.withdraw(self._withdrawn)

    def withdraw(self, choices: Sequence[int]) -> None:
        """Ends some choices, while the others go on."""
        if self._generation is None:
            self._withdrawn += choices
        else:
            self._generation.withdraw(choices)

    def expire_after(self, delay_s: float, on_due: Callable[[_Session], None]) -> None:
        """Has the generation fail once its time has passed."""

        def expire() -> None:
            self._has_expired = True
            on_due(self)

        self._expiry = asyncio.get_running_loop().call_later(delay_s, expire)

    def collect(self, output: engine_pb2.GenerationOutput) -> None:
        """Adds what has accrued, and ends the session with the last of it."""
        try:
            if self.failure is not None:
                raise self.failure
            if self._generation is not None:
                self._generation.collect(output)
            if self._has_expired and not output.finished:
                raise ServiceError(Reason.DEADLINE_EXCEEDED, "the deadline passed")
        except ServiceError as error:
            output.MergeFrom(_failed(self.session_id, error))
            self.close(error)
        except Exception:
            log.exception("a generation failed")
            defect = _defect()
            output.MergeFrom(_failed(self.session_id, defect))
            self.close(defect)
        else:
            if output.finished:
                self.close(None)

    def close(self, error: ServiceError | None) -> None:
        """Ends the generation, and aborts in the core what has not ended."""
        if self._expiry is not None:
            self._expiry.cancel()
        self._on_close(self)
        if self._waking is not None:
            self._waking.cancel()
        if self._generation is not None:
            self._generation.end(error)
        self.call.end(error)


def _defect() -> ServiceError:
    return ServiceError(Reason.INTERNAL, "internal error; the server's log has the rest")


def _failed(session_id: int, error: ServiceError) -> engine_pb2.GenerationOutput:
    return engine_pb2.GenerationOutput(
        session_id=session_id, finished=True, error=to_session_status(error)
    )
