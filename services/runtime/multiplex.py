"""Many sessions on one bidirectional stream, the server's side.

The tokenizer's StreamDecode and the safety filter's CheckCompletion carry the deltas of all
completions of a gateway in one message, so that the cost of a step does not grow with their
number. A session that fails gets its own status; the stream and its other sessions go on.
"""

from __future__ import annotations

import asyncio
import enum
import logging
from collections.abc import AsyncIterator, Callable, Iterable, Sequence
from typing import Generic, Literal, Protocol, TypeVar

from meshserve.v1 import types_pb2
from services.runtime.errors import Reason, ServiceError, invalid_field, to_session_status

log = logging.getLogger(__name__)


# Request messages read ahead of being handled.
MAX_ARRIVED = 64


class _Signal(enum.Enum):
    """What reaches the serving loop beside requests."""

    CALLER_IS_DONE = enum.auto()
    DRAINING = enum.auto()


class SessionInput(Protocol):
    """What DecodeInput and CompletionInput have in common."""

    session_id: int
    cancel: bool

    def HasField(self, field_name: Literal["open"]) -> bool:  # noqa: N802 - protobuf's own name
        ...


Input = TypeVar("Input", bound=SessionInput)
Input_contra = TypeVar("Input_contra", bound=SessionInput, contravariant=True)
Output = TypeVar("Output")
Output_co = TypeVar("Output_co", covariant=True)
Request = TypeVar("Request")


class Session(Protocol[Input_contra, Output_co]):
    """One conversation. Its code runs on the event loop and must not block."""

    finished: bool

    def feed(self, message: Input_contra) -> Output_co | None:
        """The answer to one input, if it asks for one; sets `finished` with the last.

        May raise ServiceError.
        """
        ...

    def close(self, error: ServiceError | None) -> None:
        """Called once at the end: None after a regular end, else why it ended."""
        ...


class SessionHost(Generic[Request, Input, Output]):
    """Serves the sessions of one stream.

    `inputs_of` reads a request message, `open_session` starts a session from its first input and
    `failed` makes the output that ends one with a status. While `draining` is set no session is
    opened, and the stream ends once the last one has.
    """

    def __init__(
        self,
        *,
        inputs_of: Callable[[Request], Iterable[Input]],
        open_session: Callable[[Input], Session[Input, Output]],
        failed: Callable[[int, types_pb2.SessionStatus], Output],
        draining: asyncio.Event,
        max_sessions: int = 4096,
    ) -> None:
        self._inputs_of = inputs_of
        self._open_session = open_session
        self._failed = failed
        self._draining = draining
        self._max_sessions = max_sessions
        self._sessions: dict[int, Session[Input, Output]] = {}

    async def serve(self, requests: AsyncIterator[Request]) -> AsyncIterator[Sequence[Output]]:
        """Yields the outputs of each request that has any, in the order of its inputs."""
        # Bounded, so that a caller that does not read its answers is not read from either.
        arrived: asyncio.Queue[Request | _Signal | Exception] = asyncio.Queue(MAX_ARRIVED)
        tasks = [
            asyncio.create_task(self._read(requests, arrived)),
            asyncio.create_task(self._announce_drain(arrived)),
        ]
        caller_is_done = False
        try:
            while not (caller_is_done or (self._draining.is_set() and not self._sessions)):
                item = await arrived.get()
                if isinstance(item, Exception):
                    raise item
                if isinstance(item, _Signal):
                    caller_is_done = item is _Signal.CALLER_IS_DONE
                elif outputs := self._handle(item):
                    yield outputs
        finally:
            for task in tasks:
                task.cancel()
            self._close_all()

    async def _read(
        self,
        requests: AsyncIterator[Request],
        arrived: asyncio.Queue[Request | _Signal | Exception],
    ) -> None:
        try:
            async for request in requests:
                await arrived.put(request)
        except Exception as error:
            await arrived.put(error)
        else:
            await arrived.put(_Signal.CALLER_IS_DONE)

    async def _announce_drain(self, arrived: asyncio.Queue[Request | _Signal | Exception]) -> None:
        await self._draining.wait()
        await arrived.put(_Signal.DRAINING)

    def _handle(self, request: Request) -> list[Output]:
        outputs: list[Output] = []
        for message in self._inputs_of(request):
            session_id = message.session_id
            try:
                output = self._feed(message)
            except ServiceError as error:
                outputs.append(self._fail(session_id, error))
            except Exception:
                log.exception("session failed")
                defect = ServiceError(Reason.INTERNAL, "internal error; the server's log has more")
                outputs.append(self._fail(session_id, defect))
            else:
                if output is not None:
                    outputs.append(output)
        return outputs

    def _feed(self, message: Input) -> Output | None:
        session_id = message.session_id
        if message.cancel:
            self._close(session_id, ServiceError(Reason.CANCELLED, "the session was cancelled"))
            return None
        if message.HasField("open"):
            self._open(message)
        session = self._sessions.get(session_id)
        if session is None:
            raise invalid_field("inputs.session_id", f"session {session_id} is not open")
        output = session.feed(message)
        if session.finished:
            self._close(session_id, None)
        return output

    def _open(self, message: Input) -> None:
        if message.session_id in self._sessions:
            raise invalid_field("inputs.open", f"session {message.session_id} is open already")
        if self._draining.is_set():
            raise ServiceError(Reason.DRAINING, "the replica is shutting down", retry_after_s=0.1)
        if len(self._sessions) >= self._max_sessions:
            raise ServiceError(
                Reason.QUEUE_FULL,
                f"the stream holds {self._max_sessions} sessions already",
                retry_after_s=1.0,
            )
        self._sessions[message.session_id] = self._open_session(message)

    def _fail(self, session_id: int, error: ServiceError) -> Output:
        self._close(session_id, error)
        return self._failed(session_id, to_session_status(error))

    def _close(self, session_id: int, error: ServiceError | None) -> None:
        session = self._sessions.pop(session_id, None)
        if session is None:
            return
        try:
            session.close(error)
        except Exception:
            # Its answer is given or under way, and the other sessions need theirs.
            log.exception("session failed to close")

    def _close_all(self) -> None:
        for session_id in list(self._sessions):
            self._close(session_id, ServiceError(Reason.CANCELLED, "the stream ended"))
