"""The picture of the mesh, from what its replicas have said."""

from __future__ import annotations

from collections.abc import Sequence

from google.protobuf.timestamp_pb2 import Timestamp

from meshserve.v1 import mesh_pb2
from services.gateway.overview import replicas as of_replicas
from services.gateway.overview import traffic
from services.gateway.overview.replicas import Replica
from services.runtime.settings import Settings


def snapshot(replicas: Sequence[Replica], settings: Settings) -> mesh_pb2.MeshSnapshot:
    """The mesh as it is now."""
    now = Timestamp()
    now.GetCurrentTime()
    enabled = {"cache": settings.cache.enabled, "safety": settings.safety.enabled}
    window_s = next((r.window.seconds for r in replicas if r.reporting and r.window), 0.0)
    picture = mesh_pb2.MeshSnapshot(
        time=now,
        window_ms=round(1000 * window_s),
        services=of_replicas.service_overviews(replicas, enabled),
        links=of_replicas.link_overviews(replicas),
        traffic=traffic.traffic_overview(replicas, settings),
        models=traffic.model_overviews(replicas, settings),
        tenants=traffic.tenant_overviews(replicas, settings),
        currency=settings.gateway.currency,
    )
    if settings.cache.enabled:
        picture.response_cache.CopyFrom(traffic.cache_overview(replicas))
    if settings.safety.enabled:
        picture.safety.CopyFrom(traffic.safety_overview(replicas))
    return picture
