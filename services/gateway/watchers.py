"""How many watch at a time: what is watched stands open for hours, and each costs its share."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager

from services.gateway.context import Tenant
from services.runtime.errors import Reason, ServiceError
from services.runtime.telemetry import Metrics

RETRY_AFTER_S = 10.0
# Of the places, those that one tenant may take that is no operator: the others watch as well.
TENANTS_SHARE = 1 / 8


class Watchers:
    """Those who watch by gRPC and those at the console, taken together."""

    def __init__(self, limit: int, metrics: Metrics) -> None:
        self._limit = limit
        self._limit_of_one = max(1, int(limit * TENANTS_SHARE))
        self._counts: Counter[str] = Counter()
        self._gauge = metrics.gauge("meshserve_gateway_watchers")

    @contextmanager
    def one_more(self, tenant: Tenant) -> Iterator[None]:
        """Counts somebody for as long as it lasts. Raises ServiceError (RESOURCE_EXHAUSTED)."""
        total = self._counts.total()
        if total >= self._limit:
            raise _refused(f"{total} watch already, as many as this gateway takes")
        own = self._counts[tenant.name]
        if own >= self._limit_of_one and not tenant.operator:
            raise _refused(f"{own} of {tenant.name!r} watch already, as many as one tenant may")
        self._counts[tenant.name] += 1
        self._gauge.set(total + 1)
        try:
            yield
        finally:
            self._counts[tenant.name] -= 1
            self._counts += Counter()  # forgets those that have none
            self._gauge.set(self._counts.total())


def _refused(message: str) -> ServiceError:
    return ServiceError(
        Reason.LIMIT_REACHED,
        message,
        metadata={"limit": "gateway.max_watchers"},
        retry_after_s=RETRY_AFTER_S,
    )
