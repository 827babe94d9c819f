"""The cache as a service of the mesh: its server, its health, its end."""

from __future__ import annotations

import grpc

from meshserve.v1 import cache_pb2, cache_pb2_grpc
from services.cache.backend import Backend
from services.cache.servicer import CacheServicer
from services.runtime.server import Service, StartupError
from services.runtime.settings import Settings
from services.runtime.telemetry import Metrics
from services.runtime.valkey import ValkeyUrlError, connect_as_set


class CacheService(Service):
    """Comes up without its Redis-protocol server and says so through its health, which is
    NOT_SERVING while that server is away and SERVING again within about a second of its return."""

    name = "cache"
    grpc_services = (cache_pb2.DESCRIPTOR.services_by_name["CacheService"].full_name,)

    def __init__(self, settings: Settings, metrics: Metrics) -> None:
        super().__init__(settings, metrics)
        try:
            self._client = connect_as_set(settings.valkey, metrics)
        except ValkeyUrlError as error:
            raise StartupError(str(error), "mend valkey.url, or its file") from error
        durations = metrics.histogram("meshserve_cache_backend_duration_seconds")
        self._backend = Backend(self._client, durations)
        self._servicer = CacheServicer(settings.cache, self._backend, metrics)

    def register(self, server: grpc.aio.Server) -> None:
        """Adds the cache's RPCs."""
        cache_pb2_grpc.add_CacheServiceServicer_to_server(self._servicer, server)

    async def start(self) -> None:
        """Begins to look for another URL or password."""
        self._client.start()

    async def probe(self) -> None:
        """Raises while the Redis-protocol server is away."""
        await self._backend.ping()

    async def drain(self) -> None:
        """Lets the callers go that wait for another's answer."""
        await self._servicer.drain()

    async def stop(self) -> None:
        """Closes the connections."""
        await self._servicer.stop()
        await self._client.close()
