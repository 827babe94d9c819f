"""MeshService over gRPC: the whole mesh for operators, and for everybody what is their own."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Any

from meshserve.v1 import mesh_pb2, mesh_pb2_grpc
from services.gateway.context import Tenant
from services.gateway.overview.watch import MeshWatch
from services.gateway.own_usage import OwnUsage
from services.gateway.recent import RecentRequests
from services.gateway.stages.authenticate import Authenticator
from services.gateway.watchers import Watchers
from services.runtime.errors import invalid_field

MIN_INTERVAL_MS = 250
MAX_INTERVAL_MS = 60_000
DEFAULT_INTERVAL_MS = 1000


class MeshServicer(mesh_pb2_grpc.MeshServiceServicer):
    """Answers for this gateway; MeshWatch looks at the others as well."""

    def __init__(
        self,
        watch: MeshWatch,
        authenticator: Authenticator,
        watchers: Watchers,
        recent: RecentRequests,
        usage: OwnUsage,
    ) -> None:
        self._watch = watch
        self._authenticator = authenticator
        self._watchers = watchers
        self._recent = recent
        self._usage = usage

    async def WatchMesh(  # noqa: N802
        self, request: mesh_pb2.WatchMeshRequest, context: Any
    ) -> AsyncGenerator[mesh_pb2.WatchMeshResponse]:
        """The mesh at once and then at an interval, until the caller goes away."""
        authorization = _authorization(context)
        operator = self._authenticator.operator(authorization)
        interval_ms = request.interval_ms or DEFAULT_INTERVAL_MS
        if not MIN_INTERVAL_MS <= interval_ms <= MAX_INTERVAL_MS:
            raise invalid_field(
                "interval_ms", f"must be from {MIN_INTERVAL_MS} to {MAX_INTERVAL_MS}"
            )
        watching = self._watch.snapshots(interval_ms / 1000, authorization)
        with self._watchers.one_more(operator):
            async with aclosing(watching) as snapshots:
                async for mesh in snapshots:
                    # The key may have been taken away since.
                    self._authenticator.operator(authorization)
                    yield mesh_pb2.WatchMeshResponse(mesh=mesh)

    async def ListRequests(  # noqa: N802
        self, request: mesh_pb2.ListRequestsRequest, context: Any
    ) -> mesh_pb2.ListRequestsResponse:
        """Requests of late: everybody's for an operator, else one's own."""
        tenant = self._tenant(context)
        return self._recent.report(request.cursor, None if tenant.operator else tenant.name)

    async def GetUsage(  # noqa: N802
        self, request: mesh_pb2.GetUsageRequest, context: Any
    ) -> mesh_pb2.GetUsageResponse:
        """The caller's own."""
        return await self._usage.of(self._tenant(context))

    def _tenant(self, context: Any) -> Tenant:
        return self._authenticator.tenant(_authorization(context))


def _authorization(context: Any) -> Any:
    return dict(context.invocation_metadata() or ()).get("authorization")
