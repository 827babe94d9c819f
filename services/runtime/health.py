"""grpc.health.v1 with a real probe: a service that cannot do its work says so within seconds."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Sequence

from grpc_health.v1 import health, health_pb2

from services.runtime.telemetry import Metrics

log = logging.getLogger(__name__)

PROBE_INTERVAL_S = 1.0
PROBE_TIMEOUT_S = 2.0
SERVING = health_pb2.HealthCheckResponse.SERVING
NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING


class HealthMonitor:
    """Runs a probe every second and keeps the statuses of `grpc_services` and of "" true to it."""

    def __init__(
        self, grpc_services: Sequence[str], probe: Callable[[], Awaitable[None]], metrics: Metrics
    ) -> None:
        self.servicer = health.aio.HealthServicer()
        self._names = ("", *grpc_services)
        self._probe = probe
        self._gauge = metrics.gauge("meshserve_healthy")
        self._healthy: bool | None = None
        self._task: asyncio.Task[None] | None = None

    async def start(self) -> None:
        """Probes once, so that the first answer is true, and goes on probing."""
        await self._check()
        self._task = asyncio.create_task(self._watch())

    async def shut_down(self) -> None:
        """NOT_SERVING from now on."""
        if self._task is not None:
            self._task.cancel()
        self._gauge.set(0)
        await self.servicer.enter_graceful_shutdown()

    async def _watch(self) -> None:
        while True:
            await asyncio.sleep(PROBE_INTERVAL_S)
            await self._check()

    async def _check(self) -> None:
        reason = ""
        try:
            async with asyncio.timeout(PROBE_TIMEOUT_S):
                await self._probe()
        except TimeoutError:
            reason = f"the probe took longer than {PROBE_TIMEOUT_S} s"
        except Exception as error:
            reason = str(error) or type(error).__name__
        healthy = not reason
        if healthy is self._healthy:
            return
        if not healthy:
            log.warning("not serving: %s", reason)
        elif self._healthy is not None:
            log.info("serving again")
        self._healthy = healthy
        self._gauge.set(healthy)
        for name in self._names:
            await self.servicer.set(name, SERVING if healthy else NOT_SERVING)
