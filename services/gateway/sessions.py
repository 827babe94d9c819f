"""Sessions that outlive the stream they share, the caller's side.

A stream that is lost is opened again and its sessions go on where they were, since each can say
what it had been answered; so a tokenizer or safety replica may die in the middle of a completion
without harm.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from typing import Any, Generic, TypeVar

from meshserve.v1 import safety_pb2, tokenizer_pb2
from services.runtime import deadline
from services.runtime.errors import Reason, ServiceError, from_session_status
from services.runtime.exchanges import ExchangeStream, SessionPool, StreamLostError

# A session survives a lost stream this often in a row, which covers the restart of a replica.
MAX_REOPENINGS = 8
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
