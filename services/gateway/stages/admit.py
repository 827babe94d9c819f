"""Whether there is room for the request: its shape, the tenant's rate, the gateway's load."""

from __future__ import annotations

import logging

from services.gateway.context import CallContext, Tenant
from services.gateway.pipeline import Step
from services.runtime.errors import Reason, ServiceError
from services.runtime.settings import GatewaySettings
from services.runtime.telemetry import Metrics
from services.runtime.valkey import RateLimiter, ValkeyError

log = logging.getLogger(__name__)

OVERLOAD_RETRY_S = 1.0

# Tenant and request id: ids are the callers' own, so two tenants may choose the same.
RequestName = tuple[str, str]


class Admit(Step[CallContext]):
    """Refuses what is malformed, too often or too much."""

    name = "admit"

    def __init__(self, settings: GatewaySettings, limiter: RateLimiter, metrics: Metrics) -> None:
        self._settings = settings
        self._limiter = limiter
        self._active: set[RequestName] = set()
        self._gauge = metrics.gauge("meshserve_gateway_active_requests")
        self._denials = metrics.counter("meshserve_gateway_denials")

    async def before(self, context: CallContext) -> None:
        """Raises ServiceError (INVALID_ARGUMENT, ALREADY_EXISTS, RESOURCE_EXHAUSTED)."""
        context.validate(self._settings.max_prompt_bytes)
        # Before the rate: what is refused for want of room must not cost any of it.
        self._take_place(context)
        await self._limit_rate(context.tenant)

    def after(self, context: CallContext, error: ServiceError | None) -> None:
        """Gives the place back."""
        if context.admitted:
            context.admitted = False
            self._active.remove(_name(context))
            self._gauge.set(len(self._active))

    def _take_place(self, context: CallContext) -> None:
        if len(self._active) >= self._settings.max_active_requests:
            raise ServiceError(
                Reason.QUEUE_FULL,
                f"{len(self._active)} requests are in flight",
                retry_after_s=OVERLOAD_RETRY_S,
            )
        if _name(context) in self._active:
            raise ServiceError(
                Reason.REQUEST_ID_IN_USE,
                "a request with this request_id is in flight",
                field_violations=[("request_id", "in use")],
            )
        self._active.add(_name(context))
        context.admitted = True
        self._gauge.set(len(self._active))

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
            self._denials.labels(Reason.RATE_LIMITED.value).inc()
            raise ServiceError(
                Reason.RATE_LIMITED,
                f"more than {per_minute} requests per minute",
                retry_after_s=decision.retry_after_s,
                quota_violations=[(f"tenant:{tenant.name}", f"{per_minute} requests per minute")],
            )


def _name(context: CallContext) -> RequestName:
    return context.tenant.name, context.request_id
