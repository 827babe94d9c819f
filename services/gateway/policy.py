"""Which safety policy is in force: a kept answer may be served under the same one only."""

from __future__ import annotations

import logging

from meshserve.v1 import safety_pb2, safety_pb2_grpc
from services.runtime.errors import ServiceError

log = logging.getLogger(__name__)

ASK_TIMEOUT_S = 1.0
NO_POLICY = "off"


class PolicyWatch:
    """Remembers the revision that the safety filter last named."""

    def __init__(self, safety: safety_pb2_grpc.SafetyServiceAsyncStub, *, enabled: bool) -> None:
        self._safety = safety
        self._enabled = enabled
        self._revision: str | None = None

    async def revision(self) -> str | None:
        """The revision in force; None while it cannot be known."""
        if not self._enabled:
            return NO_POLICY
        if self._revision is None:
            try:
                policy = await self._safety.GetPolicy(
                    safety_pb2.GetPolicyRequest(), timeout=ASK_TIMEOUT_S
                )
            except ServiceError as error:
                log.warning("the safety policy is not known: %s", error.message)
                return None
            self._revision = policy.revision
        return self._revision

    def seen(self, revision: str) -> None:
        """Takes note of the revision in an answer of the filter."""
        self._revision = revision
