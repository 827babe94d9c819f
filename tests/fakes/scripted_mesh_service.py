"""A gateway that shows a picture of a mesh that does not exist."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from concurrent import futures
from typing import Any

import grpc

from meshserve.v1 import mesh_pb2, mesh_pb2_grpc, monitor_pb2
from services.runtime.errors import ServiceError, status_metadata

SERVING = monitor_pb2.REPLICA_STATE_SERVING


def picture(number: int = 1, engines: int = 1) -> mesh_pb2.MeshSnapshot:
    """A mesh under load, the `number`-th time that somebody looks, half a second apart."""
    latency = mesh_pb2.LatencyOverview(count=20, mean_ms=12, p50_ms=10, p95_ms=250, p99_ms=1500)
    mesh = mesh_pb2.MeshSnapshot(window_ms=500 * (number - 1), currency="USD")
    mesh.time.FromMilliseconds(1_800_000_000_000 + 500 * number)
    for service in ("gateway", "tokenizer", "engine", "cache", "safety", "valkey"):
        overview = mesh.services.add(service=service, enabled=True)
        for index in range(engines if service == "engine" else 1):
            replica = overview.replicas.add(
                address=f"10.0.0.{index + 1}:50051", service=service, state=SERVING,
                instance_id=f"{service}-{index}", version="0.1.0", uptime_ms=3_700_000,
                cpu_cores=0.25 * (index + 1), memory_bytes=200 * 2**20, active_calls=3,
                calls_per_second=12.3, error_ratio=0.01, latency=latency,
            )  # fmt: skip
            replica.reporting = service == "gateway"
            if service == "engine":
                replica.engine.CopyFrom(
                    mesh_pb2.EngineOverview(
                        model="demo",
                        running_sequences=7,
                        waiting_sequences=index,
                        kv_blocks=100,
                        kv_blocks_used=42,
                        generated_tokens_per_second=100 * (index + 1),
                        prompt_tokens_per_second=50,
                        prefix_hit_ratio=0.31,
                        steps_per_second=40,
                        step_time=latency,
                        batch_tokens=9,
                        generated_tokens_total=50 * number,
                        device="cpu",
                    )
                )
    mesh.traffic.CopyFrom(
        mesh_pb2.TrafficOverview(
            active_requests=9,
            requests_per_second=12.3,
            requests_total=10 * number,
            error_ratio=0.02,
            time_to_first_token=latency,
            completion_tokens_total=1234,
            errors=[mesh_pb2.NamedRate(name="RATE_LIMITED", per_second=0.2, total=3)],
            cost_per_hour=1.5,
            cost_total=0.25,
        )
    )
    mesh.models.add(model="demo", ready=True, requests_per_second=12.3, cost_total=0.25)
    mesh.response_cache.CopyFrom(
        mesh_pb2.ResponseCacheOverview(lookups_per_second=4, hit_ratio=0.5)
    )
    mesh.safety.CopyFrom(
        mesh_pb2.SafetyOverview(
            checks_per_second=8, actions=[mesh_pb2.NamedRate(name="block", total=17)]
        )
    )
    mesh.tenants.add(tenant="acme", requests_per_second=2, requests_per_minute_limit=240)
    return mesh


class ScriptedMeshService(mesh_pb2_grpc.MeshServiceServicer):
    """Serves `pictures`, one each half second as fast as they are asked for, or an error."""

    def __init__(
        self,
        port: int = 0,
        make: Callable[[int], mesh_pb2.MeshSnapshot] = picture,
        error: ServiceError | None = None,
    ) -> None:
        self._make = make
        self._error = error
        self._closed = threading.Event()
        self.authorizations: list[str | None] = []
        self._server = grpc.server(
            futures.ThreadPoolExecutor(4), options=[("grpc.so_reuseport", 0)]
        )
        mesh_pb2_grpc.add_MeshServiceServicer_to_server(self, self._server)
        self.port = self._server.add_insecure_port(f"127.0.0.1:{port}")
        self.target = f"127.0.0.1:{self.port}"
        self._server.start()

    def WatchMesh(
        self, request: mesh_pb2.WatchMeshRequest, context: Any
    ) -> Iterator[mesh_pb2.WatchMeshResponse]:
        self.authorizations.append(dict(context.invocation_metadata()).get("authorization"))
        if self._error is not None:
            context.set_trailing_metadata(status_metadata(self._error))
            context.abort(self._error.code, self._error.message)
        number = 0
        while context.is_active() and not self._closed.is_set():
            number += 1
            yield mesh_pb2.WatchMeshResponse(mesh=self._make(number))
            self._closed.wait(request.interval_ms / 1000)

    def stop(self) -> None:
        self._closed.set()
        self._server.stop(0).wait()
