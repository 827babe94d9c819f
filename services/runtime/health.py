"""grpc.health.v1 with a real probe: a service that cannot do its work says so within seconds."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from typing import TypeAlias

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

from services.runtime.health_check import LIVENESS
from services.runtime.telemetry import Metrics

log = logging.getLogger(__name__)

PROBE_INTERVAL_S = 1.0
PROBE_TIMEOUT_S = 2.0
ServingStatus: TypeAlias = int  # its stubs have no name for it
SERVING = health_pb2.HealthCheckResponse.SERVING
NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING
# Metadata that watchers get first: one replica may be found under several addresses.
INSTANCE_HEADER = "meshserve-instance-id"


class HealthServicer(health_pb2_grpc.HealthServicer):
    """Answers what `set` was told last. Watchers are sent away at the end: a server that stops
    waits for its calls, and theirs would never end.

    Attributes:
        instance_id: tells this process from all others.
    """

    def __init__(self) -> None:
        self.instance_id = uuid.uuid4().hex
        self._statuses: dict[str, ServingStatus] = {LIVENESS: SERVING}
        self._shut_down = False
        self._changed = asyncio.Event()

    def set(self, names: Sequence[str], status: ServingStatus) -> None:
        """Sets the status of services; does nothing after `shut_down`."""
        if not self._shut_down:
            self._statuses.update(dict.fromkeys(names, status))
            self._announce()

    def shut_down(self) -> None:
        """Everything but the liveness is NOT_SERVING from now on."""
        self.set([name for name in self._statuses if name != LIVENESS], NOT_SERVING)
        self._shut_down = True
        self._announce()

    async def Check(  # noqa: N802
        self,
        request: health_pb2.HealthCheckRequest,
        context: grpc.aio.ServicerContext[
            health_pb2.HealthCheckRequest, health_pb2.HealthCheckResponse
        ],
    ) -> health_pb2.HealthCheckResponse:
        """The status of a service, or NOT_FOUND."""
        status = self._statuses.get(request.service)
        if status is not None:
            return health_pb2.HealthCheckResponse(status=status)
        return await context.abort(grpc.StatusCode.NOT_FOUND, "no such service")

    async def Watch(  # noqa: N802
        self,
        request: health_pb2.HealthCheckRequest,
        context: grpc.aio.ServicerContext[
            health_pb2.HealthCheckRequest, health_pb2.HealthCheckResponse
        ],
    ) -> AsyncIterator[health_pb2.HealthCheckResponse]:
        """The status of a service and its changes."""
        await context.send_initial_metadata(((INSTANCE_HEADER, self.instance_id),))
        told: ServingStatus | None = None
        while True:
            changed = self._changed
            status = self._statuses.get(
                request.service, health_pb2.HealthCheckResponse.SERVICE_UNKNOWN
            )
            if status != told:
                yield health_pb2.HealthCheckResponse(status=status)
                told = status
            if self._shut_down and changed is self._changed:
                return
            await changed.wait()

    def _announce(self) -> None:
        # Watchers wait for the event of the state they have seen.
        self._changed.set()
        self._changed = asyncio.Event()


class HealthMonitor:
    """Runs a probe every second and keeps the statuses of `grpc_services` and of "" true to it."""

    def __init__(
        self, grpc_services: Sequence[str], probe: Callable[[], Awaitable[None]], metrics: Metrics
    ) -> None:
        self.servicer = HealthServicer()
        self._names = ("", *grpc_services)
        self._probe = probe
        self._gauge = metrics.gauge("meshserve_healthy")
        self.healthy: bool | None = None
        # Whether the probe has ever succeeded, and why it fails; empty while it succeeds.
        self.was_healthy = False
        self.problem = ""
        self._task: asyncio.Task[None] | None = None

    async def start(self) -> None:
        """Probes once, so that the first answer is true, and goes on probing."""
        await self._check()
        self._task = asyncio.create_task(self._watch())

    async def shut_down(self) -> None:
        """NOT_SERVING from now on."""
        if self._task is not None:
            self._task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._task
        self._gauge.set(0)
        self.servicer.shut_down()

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
        self.problem = reason
        healthy = not reason
        if healthy is self.healthy:
            return
        if not healthy:
            log.warning("not serving: %s", reason)
        elif self.healthy is not None:
            log.info("serving again")
        self.healthy = healthy
        self.was_healthy |= healthy
        self._gauge.set(healthy)
        self.servicer.set(self._names, SERVING if healthy else NOT_SERVING)
