"""Calls to one engine about what it has in memory, and how they are counted."""

from __future__ import annotations

from typing import Any

from meshserve.v1 import engine_pb2, engine_pb2_grpc
from services.gateway.hosting.plan import Action
from services.runtime.channels import MeshChannel
from services.runtime.errors import ServiceError
from services.runtime.replicas import Replica
from services.runtime.telemetry import Metrics

# Reading weights takes its time; what takes longer is asked for again.
LOAD_TIMEOUT_S = 1800.0
# How long requests in flight hold up an adapter that is to go.
UNLOAD_TIMEOUT_S = 600.0


class HostingCalls:
    """Makes them. Each is one try at one replica; the deadline of the current task bounds it."""

    def __init__(self, metrics: Metrics) -> None:
        self._calls = metrics.counter("meshserve_gateway_hosting_calls")

    async def perform(self, channel: MeshChannel, replica: Replica, action: Action) -> Any:
        """The engine's answer. Raises ServiceError."""
        match action.kind:
            case "load_model":
                request: Any = engine_pb2.LoadModelRequest(model=action.model)
            case "unload_model":
                request = engine_pb2.UnloadModelRequest(model=action.model)
            case "load_adapter":
                request = engine_pb2.LoadAdapterRequest(
                    adapter=action.adapter, source=action.source, model=action.model
                )
            case "unload_adapter":
                request = engine_pb2.UnloadAdapterRequest(
                    adapter=action.adapter, model=action.model
                )
        return await self.ask(channel, replica, action.kind, request)

    async def ask(self, channel: MeshChannel, replica: Replica, kind: str, request: Any) -> Any:
        """What an engine answers to a request of some kind, for example `sleep_model`. Raises
        ServiceError."""
        stub: Any = engine_pb2_grpc.EngineServiceStub(channel.at(replica))
        method = getattr(stub, "".join(word.capitalize() for word in kind.split("_")))
        timeout_s = UNLOAD_TIMEOUT_S if kind == "unload_adapter" else LOAD_TIMEOUT_S
        try:
            answer = await method(request, timeout=timeout_s)
        except ServiceError as error:
            self._calls.labels(kind, error.reason.value).inc()
            raise
        self._calls.labels(kind, "").inc()
        return answer
