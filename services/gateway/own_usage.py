"""What a tenant may use, and what it has used of this gateway since it started."""

from __future__ import annotations

import time
from collections.abc import Iterator

from google.protobuf.timestamp_pb2 import Timestamp

from meshserve.v1 import mesh_pb2
from services.gateway.context import Tenant
from services.gateway.recent import RecentRequests
from services.runtime.errors import Reason
from services.runtime.settings import Settings
from services.runtime.telemetry import Metrics
from services.runtime.valkey import RateLimiter, ValkeyError

# Counters by tenant and model, and the field that tells each.
_COUNTERS = {
    "cached_responses": "meshserve_gateway_cached_responses",
    "prompt_tokens": "meshserve_gateway_prompt_tokens",
    "cached_prompt_tokens": "meshserve_gateway_cached_prompt_tokens",
    "completion_tokens": "meshserve_gateway_completion_tokens",
}


class OwnUsage:
    """Reads it from the metrics and the limits, which count it anyway."""

    def __init__(
        self, settings: Settings, limiter: RateLimiter, metrics: Metrics, recent: RecentRequests
    ) -> None:
        self._settings = settings
        self._limiter = limiter
        self._metrics = metrics
        self._recent = recent
        self._started_at = Timestamp(seconds=int(time.time()))

    async def of(self, tenant: Tenant) -> mesh_pb2.GetUsageResponse:
        """The usage of a tenant."""
        gateway = self._settings.gateway
        return mesh_pb2.GetUsageResponse(
            instance_id=self._recent.instance_id,
            tenant=tenant.name,
            start_time=self._started_at,
            models=self._models(tenant.name),
            active_requests=self._recent.active(tenant.name),
            max_active_requests=gateway.max_active_requests,
            allowance=await self._allowance(tenant),
            currency=gateway.currency,
        )

    async def _allowance(self, tenant: Tenant) -> mesh_pb2.RequestAllowance | None:
        limits = self._settings.gateway.rate_limit
        per_minute = tenant.requests_per_minute or limits.requests_per_minute
        if per_minute is None:
            return None
        allowance = mesh_pb2.RequestAllowance(requests_per_minute=per_minute, burst=limits.burst)
        try:
            found = await self._limiter.look(
                tenant.name, limit_per_minute=per_minute, burst=limits.burst
            )
        except ValkeyError:
            return allowance
        allowance.remaining = found.remaining
        allowance.full_after_ms = round(found.reset_after_s * 1000)
        return allowance

    def _models(self, tenant: str) -> list[mesh_pb2.ModelUsage]:
        used: dict[str, mesh_pb2.ModelUsage] = {}

        def of(model: str) -> mesh_pb2.ModelUsage:
            return used.setdefault(model, mesh_pb2.ModelUsage(model=model))

        for labels, value in self._counted("meshserve_gateway_requests", tenant):
            usage = of(labels["model"])
            usage.requests += int(value)
            if labels["reason"] not in ("", Reason.CANCELLED):
                usage.failed_requests += int(value)
        for field, name in _COUNTERS.items():
            for labels, value in self._counted(name, tenant):
                setattr(of(labels["model"]), field, int(value))
        for labels, value in self._counted("meshserve_gateway_cost", tenant):
            of(labels["model"]).cost = value
        return [used[model] for model in sorted(used)]

    def _counted(self, name: str, tenant: str) -> Iterator[tuple[dict[str, str], float]]:
        for family in self._metrics.counter(name).collect():
            for sample in family.samples:
                if sample.labels["tenant"] == tenant and sample.name.endswith("_total"):
                    yield sample.labels, sample.value
