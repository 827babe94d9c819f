"""Whether there is room for the request: its shape, the tenant's rate, the gateway's load."""

from __future__ import annotations

import logging

from services.gateway.context import RequestContext, Tenant
from services.gateway.pipeline import Stage
from services.gateway.validation import validate
from services.runtime.errors import Reason, ServiceError
from services.runtime.settings import GatewaySettings
from services.runtime.telemetry import Metrics
from services.runtime.valkey import RateLimiter, ValkeyError

log = logging.getLogger(__name__)

OVERLOAD_RETRY_S = 1.0


class Admit(Stage):
    """Refuses what is malformed, too often or too much."""

    name = "admit"

    def __init__(self, settings: GatewaySettings, limiter: RateLimiter, metrics: Metrics) -> None:
        self._settings = settings
        self._limiter = limiter
        self._active = 0
        self._gauge = metrics.gauge("meshserve_gateway_active_requests")
        self._holding: set[int] = set()

    async def before(self, context: RequestContext) -> None:
        """Raises ServiceError (INVALID_ARGUMENT, RESOURCE_EXHAUSTED)."""
        validate(context.request, self._settings.max_prompt_bytes)
        await self._limit_rate(context.tenant)
        if self._active >= self._settings.max_active_requests:
            raise ServiceError(
                Reason.QUEUE_FULL,
                f"{self._active} requests are in flight",
                retry_after_s=OVERLOAD_RETRY_S,
            )
        self._active += 1
        self._holding.add(id(context))
        self._gauge.set(self._active)

    async def after(self, context: RequestContext, error: ServiceError | None) -> None:
        """Gives the place back."""
        if id(context) in self._holding:
            self._holding.remove(id(context))
            self._active -= 1
            self._gauge.set(self._active)

    async def _limit_rate(self, tenant: Tenant) -> None:
        limits = self._settings.rate_limit
        per_minute = tenant.requests_per_minute or limits.requests_per_minute
        if per_minute is None:
            return
        try:
            decision = await self._limiter.acquire(
                tenant.name, limit_per_minute=per_minute, burst=limits.burst
            )
        except ValkeyError as error:
            if limits.when_unavailable == "refuse":
                raise ServiceError(
                    Reason.LIMITS_UNAVAILABLE,
                    "the limits cannot be read",
                    retry_after_s=OVERLOAD_RETRY_S,
                ) from error
            log.warning("the rate limit is not enforced: %s", error)
            return
        if not decision.allowed:
            raise ServiceError(
                Reason.RATE_LIMITED,
                f"more than {per_minute} requests per minute",
                retry_after_s=decision.retry_after_s,
                quota_violations=[(f"tenant:{tenant.name}", f"{per_minute} requests per minute")],
            )
