"""Which safety policy is in force: a kept answer may be served under the same one only."""

from __future__ import annotations

import asyncio
import logging

from meshserve.v1 import safety_pb2, safety_pb2_grpc
from services.runtime.errors import ServiceError

log = logging.getLogger(__name__)

ASK_TIMEOUT_S = 1.0
ASK_INTERVAL_S = 5.0
NO_POLICY = "off"


class PolicyWatch:
    """Knows the revision that the safety filter last named, and asks for it again and again: a
    gateway that answers from the cache alone would not see a new policy otherwise."""

    def __init__(self, safety: safety_pb2_grpc.SafetyServiceAsyncStub, *, enabled: bool) -> None:
        self._safety = safety
        self._enabled = enabled
        self._revision: str | None = None
        self._task: asyncio.Task[None] | None = None

    def start(self) -> None:
        """Begins to ask."""
        if self._enabled:
            self._task = asyncio.create_task(self._ask_forever())

    def stop(self) -> None:
        """Asks no more."""
        if self._task is not None:
            self._task.cancel()

    async def revision(self) -> str | None:
        """The revision in force; None while it cannot be known."""
        if not self._enabled:
            return NO_POLICY
        if self._revision is None:
            await self._ask()
        return self._revision

    def seen(self, revision: str) -> None:
        """Takes note of the revision in an answer of the filter."""
        self._revision = revision

    async def _ask(self) -> None:
        try:
            policy = await self._safety.GetPolicy(
                safety_pb2.GetPolicyRequest(), timeout=ASK_TIMEOUT_S
            )
        except ServiceError as error:
            log.info("the safety policy is not known: %s", error.message)
        else:
            self._revision = policy.revision

    async def _ask_forever(self) -> None:
        while True:
            await asyncio.sleep(ASK_INTERVAL_S)
            try:
                await self._ask()
            except Exception:
                log.exception("the safety policy is not known")
