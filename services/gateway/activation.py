"""Models whose engines run only while they are asked for: a request waits until one is there.

What starts an engine is outside of the mesh, for example KEDA; it sees who waits in a metric.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable

import grpc

from services.runtime.errors import Reason, ServiceError
from services.runtime.settings import Settings
from services.runtime.telemetry import Metrics

# How often an engine is asked for while requests wait.
ASK_INTERVAL_S = 0.5
# For how long an engine that has answered is taken to be there.
TRUSTED_S = 1.0
_ABSENT = (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.DEADLINE_EXCEEDED)


class Activation:
    """Waits for engines; for each model one asks, for all who wait."""

    def __init__(self, settings: Settings, metrics: Metrics) -> None:
        self._timeouts_s = {
            name: model.activation_timeout_s
            for name, model in settings.models.items()
            if model.activation_timeout_s is not None
        }
        self._asking = {name: asyncio.Lock() for name in self._timeouts_s}
        self._answered_at: dict[str, float] = {}
        self._waiting = metrics.gauge("meshserve_gateway_requests_awaiting_engine")
        for name in self._timeouts_s:
            # What scales by it must see a 0, not nothing.
            self._waiting.labels(name)

    def covers(self, name: str) -> bool:
        """Whether requests wait for the engines of a model."""
        return name in self._timeouts_s

    def answered(self, name: str) -> None:
        """An engine of the model has described it."""
        self._answered_at[name] = time.monotonic()

    async def wait(self, name: str, describe: Callable[[], Awaitable[object]]) -> None:
        """Returns once an engine of the model has described it, now or in the last second.

        Args:
            name: a model that is covered.
            describe: asks its engines, and tells `answered`; UNAVAILABLE and DEADLINE_EXCEEDED say
                that there is none.

        Raises:
            ServiceError: SERVICE_UNAVAILABLE after `activation_timeout_s`, or what else `describe`
                raises.
        """
        if self._is_trusted(name):
            return
        timeout_s = self._timeouts_s[name]
        with self._waiting.labels(name).track_inprogress():
            try:
                async with asyncio.timeout(timeout_s), self._asking[name]:
                    while not self._is_trusted(name):
                        try:
                            await describe()
                        except ServiceError as error:
                            if error.code not in _ABSENT:
                                raise
                            await asyncio.sleep(ASK_INTERVAL_S)
            except TimeoutError:
                raise ServiceError(
                    Reason.SERVICE_UNAVAILABLE,
                    f"no engine of the model {name!r} was there within {timeout_s:g} s",
                    retry_after_s=ASK_INTERVAL_S,
                    metadata={"service": "engine"},
                ) from None

    def _is_trusted(self, name: str) -> bool:
        return time.monotonic() - self._answered_at.get(name, -TRUSTED_S) < TRUSTED_S
