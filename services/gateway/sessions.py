"""Sessions that outlive the stream they share, the caller's side.

A stream that is lost is opened again and its sessions go on where they were, since each can say
what it had been answered; so a tokenizer or safety replica may die in the middle of a completion
without harm.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any, Generic, TypeVar

from meshserve.v1 import safety_pb2, tokenizer_pb2
from services.runtime import deadline
from services.runtime.attempts import unreachable
from services.runtime.errors import Reason, ServiceError, from_session_status
from services.runtime.exchanges import ExchangeStream, SessionPool, StreamLostError
from services.runtime.replicas import Replica

# For so long a session looks for a replica that takes it, which covers the restart of the only one.
REOPEN_FOR_S = 10.0
REOPEN_DELAY_S = 0.1
REOPEN_MAX_DELAY_S = 1.0
NO_DEADLINE_TIMEOUT_S = 60.0

Input = TypeVar("Input", tokenizer_pb2.DecodeInput, safety_pb2.CompletionInput)
Output = TypeVar("Output", tokenizer_pb2.DecodeOutput, safety_pb2.CompletionOutput)


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
        self._stream: ExchangeStream[Input, Output] | None = None
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
        if output.finished:
            self._over = True
            self._leave()
        return output

    def cancel(self) -> None:
        """Gives the session up, unless it is over."""
        self._give_up()
        self._over = True

    async def _exchange(self, payload: Any, timeout_s: float) -> Output:
        """Raises TimeoutError, and ServiceError."""
        give_up_at = time.monotonic() + timeout_s
        reopen_until: float | None = None
        delay_s = REOPEN_DELAY_S
        tried: list[Replica] = []
        while True:
            opening = self._leaves()
            stream = self._enter(tried) if opening else self._stream
            if stream is not None:
                try:
                    output = await stream.exchange(
                        self._id, self._make_input(self._id, payload, opening), timeout_s
                    )
                except StreamLostError:
                    pass
                else:
                    if not output.HasField("error"):
                        return output
                    error = from_session_status(output.error, peer=self._pool.peer)
                    if error.reason is not Reason.DRAINING:
                        self._over = True
                        self._leave()
                        raise error
                stream.replica.pause()
                tried.append(stream.replica)
                self._leave()
            reopen_until = reopen_until or time.monotonic() + REOPEN_FOR_S
            if not self._pool.replicas.has_other(tried):
                left_s = give_up_at - time.monotonic()
                await self._pool.replicas.wait_for_other(tried, min(delay_s, left_s))
                delay_s = min(2 * delay_s, REOPEN_MAX_DELAY_S)
                # Who was away may be back.
                tried.clear()
            timeout_s = give_up_at - time.monotonic()
            if timeout_s <= 0:
                raise TimeoutError
            if time.monotonic() > reopen_until:
                raise unreachable(self._pool.peer)

    def _leaves(self) -> bool:
        """Whether the session has to be opened: it is on no stream, or its replica drains while
        another could take it."""
        stream = self._stream
        if stream is None:
            return True
        if stream.replica.takes_calls or not self._pool.replicas.has_other([stream.replica]):
            return False
        self._give_up()
        return True

    def _enter(self, avoid: list[Replica]) -> ExchangeStream[Input, Output] | None:
        """Takes a stream, if there is anybody to stream to."""
        self._stream = self._pool.stream(avoid)
        if self._stream is not None:
            self._stream.replica.begin()
        return self._stream

    def _leave(self) -> None:
        """Is on no stream from now on."""
        if self._stream is not None:
            self._stream.replica.end()
            self._stream = None
            self._id = self._pool.new_session_id()

    def _give_up(self) -> None:
        stream = self._stream
        if stream is not None and not stream.lost and not self._over:
            stream.send(self._make_cancel(self._id))
        self._leave()
