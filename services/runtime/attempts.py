"""Where a call goes, and whether it is tried again: at another replica where there is one."""

from __future__ import annotations

import math
import random
import time

import grpc

from services.runtime.errors import Reason, ServiceError
from services.runtime.replicas import Eligible, Replica, ReplicaSet

MAX_ATTEMPTS = 4
FIRST_DELAY_S = 0.05
LONGEST_DELAY_S = 0.5
# How long a call waits for the first answer to what addresses a name has.
LOOK_UP_WAIT_S = 5.0


class Attempts:
    """The tries of one call.

    UNAVAILABLE (no other code: nothing else is known to be without effect) is tried again, as long
    as the caller has not been told anything yet. So is what one engine refuses because it has not
    the model in memory, where there is another. Each try is at a replica that has not been tried,
    at once where one serves; where none does there is a pause before it.

    Args:
        replicas: who can be called.
        peer: the service's name.
        timeout_s: for all tries together; None for no limit.
        only: the one replica to call, once and however it does. Default: any that serves.
        eligible: says of a replica whether it can take the call. Default: all can.
    """

    __slots__ = ("_count", "_eligible", "_give_up_at", "_only", "_peer", "_replicas", "_tried")

    def __init__(
        self,
        replicas: ReplicaSet,
        peer: str,
        timeout_s: float | None,
        only: Replica | None = None,
        eligible: Eligible | None = None,
    ) -> None:
        self._replicas = replicas
        self._peer = peer
        self._give_up_at = math.inf if timeout_s is None else time.monotonic() + timeout_s
        self._only = only
        self._eligible = eligible
        self._tried: tuple[Replica, ...] = ()
        self._count = 0

    def remaining_s(self) -> float | None:
        """What is left of the time-out; None for no limit. Raises ServiceError (DEADLINE_EXCEEDED)
        once it has passed."""
        if self._give_up_at == math.inf:
            return None
        left_s = self._give_up_at - time.monotonic()
        if left_s <= 0:
            raise ServiceError(
                Reason.DEADLINE_EXCEEDED, "the deadline passed", metadata={"service": self._peer}
            )
        return left_s

    def pick(self) -> Replica:
        """Who is tried next. Raises ServiceError (UNAVAILABLE) if there is nobody."""
        replica = self._only or self._replicas.pick(self._tried, self._eligible)
        if replica is None:
            raise unreachable(self._peer)
        return replica

    async def may_go_on(self, error: ServiceError, replica: Replica | None) -> bool:
        """Whether to try again after a failure, now. `replica` is where it failed; None if there
        was nobody to call."""
        self._count += 1
        if self._only is not None:
            return False
        if error.reason is Reason.MODEL_NOT_LOADED and replica is not None:
            self._tried = (*self._tried, replica)
            return self._replicas.has_other(self._tried, self._eligible)
        if error.code is not grpc.StatusCode.UNAVAILABLE:
            return False
        if replica is not None:
            replica.pause()
            self._tried = (*self._tried, replica)
        if self._count == MAX_ATTEMPTS:
            return False
        left_s = self._give_up_at - time.monotonic()
        if not self._replicas.is_known:
            await self._replicas.wait_until_known(min(LOOK_UP_WAIT_S, left_s))
            return True
        delay_s = min(FIRST_DELAY_S * 2 ** (self._count - 1), LONGEST_DELAY_S)
        delay_s *= random.uniform(0.8, 1.2)
        await self._replicas.wait_for_other(self._tried, min(delay_s, left_s), self._eligible)
        return True


def unreachable(peer: str) -> ServiceError:
    """Nobody of the service can be called."""
    return ServiceError(
        Reason.SERVICE_UNAVAILABLE,
        f"the {peer} service cannot be reached",
        retry_after_s=1.0,
        metadata={"service": peer},
    )
