"""How many watch at a time: what is watched stands open for hours, and each costs its share."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from services.runtime.errors import Reason, ServiceError
from services.runtime.telemetry import Metrics

RETRY_AFTER_S = 10.0


class Watchers:
    """Those who watch by gRPC and those at the console, taken together."""

    def __init__(self, limit: int, metrics: Metrics) -> None:
        self._limit = limit
        self._count = 0
        self._gauge = metrics.gauge("meshserve_gateway_watchers")

    @contextmanager
    def one_more(self) -> Iterator[None]:
        """Counts somebody for as long as it lasts. Raises ServiceError (RESOURCE_EXHAUSTED)."""
        if self._count >= self._limit:
            raise ServiceError(
                Reason.LIMIT_REACHED,
                f"{self._count} watch already, as many as this gateway takes",
                metadata={"limit": "gateway.max_watchers"},
                retry_after_s=RETRY_AFTER_S,
            )
        self._count += 1
        self._gauge.set(self._count)
        try:
            yield
        finally:
            self._count -= 1
            self._gauge.set(self._count)
