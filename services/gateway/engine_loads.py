"""What engines do for all gateways together, so that each gateway sees the work of the others."""

from __future__ import annotations

import asyncio
import contextvars
import logging
from typing import Any

from meshserve.v1 import engine_pb2, engine_pb2_grpc
from services.runtime.channels import MeshChannel
from services.runtime.errors import ServiceError
from services.runtime.replicas import Replica

log = logging.getLogger(__name__)

REPORT_INTERVAL_MS = 500
# How long after its stream of reports has ended, or after it was found, a replica is asked.
LOOK_INTERVAL_S = 1.0


class EngineLoads:
    """Watches the load of each engine of a channel, until it is closed."""

    def __init__(self, channel: MeshChannel) -> None:
        self._channel = channel
        self._watches: dict[Replica, asyncio.Task[None]] = {}
        self._task = asyncio.create_task(self._look(), context=contextvars.Context())

    def close(self) -> None:
        """Watches no longer."""
        for task in (self._task, *self._watches.values()):
            task.cancel()

    async def _look(self) -> None:
        while True:
            self._watches = {
                replica: task for replica, task in self._watches.items() if not task.done()
            }
            for replica in self._channel.replicas:
                if replica.takes_calls and replica not in self._watches:
                    self._watches[replica] = asyncio.create_task(self._watch(replica))
            await asyncio.sleep(LOOK_INTERVAL_S)

    async def _watch(self, replica: Replica) -> None:
        stub: Any = engine_pb2_grpc.EngineServiceStub(self._channel.at(replica))
        request = engine_pb2.WatchLoadRequest(interval_ms=REPORT_INTERVAL_MS)
        try:
            async for load in stub.WatchLoad(request, standing=True):
                replica.report(load.waiting_sequences + load.running_sequences)
        except ServiceError as error:
            log.debug("the load of %s is not known: %s", replica.address, error.message)
        finally:
            replica.report(0)
