"""Asks a service of the mesh whether it can do its work, over grpc.health.v1."""

from __future__ import annotations

from enum import StrEnum
from typing import Any

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

from meshserve.transport import Endpoint

CHECK_TIMEOUT_S = 3.0
RECONNECT_AT_ONCE = {
    "grpc.initial_reconnect_backoff_ms": 100,
    "grpc.min_reconnect_backoff_ms": 500,
    "grpc.max_reconnect_backoff_ms": 250,
    "grpc.use_local_subchannel_pool": 1,
}


class Health(StrEnum):
    """What a service says of itself, or what its silence means."""

    SERVING = "serving"
    NOT_SERVING = "not serving"
    UNREACHABLE = "unreachable"
    SILENT = "silent"
    """It took the call and did not answer in time."""


class HealthChecker:
    """Asks one endpoint again and again. Belongs to one event loop; close it when done."""

    def __init__(self, endpoint: Endpoint) -> None:
        # Whoever asks for health wants to know at once when it is back.
        options = tuple({**dict(endpoint.channel_options), **RECONNECT_AT_ONCE}.items())
        self._channel = (
            grpc.aio.insecure_channel(endpoint.target, options)
            if endpoint.credentials is None
            else grpc.aio.secure_channel(endpoint.target, endpoint.credentials, options)
        )
        self._stub: Any = health_pb2_grpc.HealthStub(self._channel)

    async def check(self, service: str = "", *, timeout_s: float = CHECK_TIMEOUT_S) -> Health:
        """The health of a gRPC service by its full name, or of the server as a whole."""
        request = health_pb2.HealthCheckRequest(service=service)
        try:
            response = await self._stub.Check(request, timeout=timeout_s)
        except grpc.aio.AioRpcError as error:
            if error.code() is grpc.StatusCode.DEADLINE_EXCEEDED:
                return Health.SILENT
            if error.code() is grpc.StatusCode.UNAVAILABLE:
                return Health.UNREACHABLE
            return Health.NOT_SERVING
        serving = response.status == health_pb2.HealthCheckResponse.SERVING
        return Health.SERVING if serving else Health.NOT_SERVING

    async def close(self) -> None:
        """Closes the connection."""
        await self._channel.close()
