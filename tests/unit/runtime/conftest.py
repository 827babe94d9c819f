"""A test service behind the runtime's interceptor, on loopback, with its spans in memory."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import AsyncExitStack
from dataclasses import dataclass, field
from typing import Any

import grpc
import pytest
from grpc_health.v1 import health_pb2_grpc
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import SpanKind

from meshserve.v1 import calls_pb2_grpc
from services.runtime import carried_calls, client_calls, server_calls
from services.runtime.call_host import CallHost
from services.runtime.channels import MeshChannel, connect
from services.runtime.health import SERVING, HealthMonitor
from services.runtime.server_calls import CallInterceptor
from services.runtime.telemetry import Metrics
from tests.fakes.shapes import SERVICE, Shapes, ShapesStub


@dataclass
class Spans:
    """The spans that ended."""

    exporter: InMemorySpanExporter

    def of(self, kind: SpanKind) -> list[ReadableSpan]:
        return [span for span in self.exporter.get_finished_spans() if span.kind is kind]

    @property
    def client(self) -> ReadableSpan:
        (span,) = self.of(SpanKind.CLIENT)
        return span

    @property
    def server(self) -> ReadableSpan:
        (span,) = self.of(SpanKind.SERVER)
        return span


@pytest.fixture
def provider() -> TracerProvider:
    return TracerProvider()


@pytest.fixture
def spans(provider: TracerProvider, monkeypatch: pytest.MonkeyPatch) -> Iterator[Spans]:
    exporter = InMemorySpanExporter()
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    for module in (client_calls, server_calls, carried_calls):
        monkeypatch.setattr(module, "get_tracer", lambda: provider.get_tracer("test"))
    yield Spans(exporter)
    provider.shutdown()


@dataclass
class Replica:
    """One server of a test service."""

    shapes: Any
    server: grpc.aio.Server
    health: HealthMonitor
    metrics: Metrics
    calls: CallInterceptor
    port: int

    @property
    def target(self) -> str:
        return f"ipv4:127.0.0.1:{self.port}"


@dataclass
class Loopback:
    """Starts servers and channels, and ends them with the test."""

    stack: AsyncExitStack
    metrics: Metrics = field(default_factory=lambda: Metrics("gateway"))

    async def serve(
        self,
        shapes: Any = None,
        port: int = 0,
        draining: asyncio.Event | None = None,
        host: str = "127.0.0.1",
    ) -> Replica:
        """With `draining` the calls of the service can be carried on a stream."""
        shapes = shapes or Shapes()
        metrics = Metrics("engine")
        calls = CallInterceptor(metrics)
        server = grpc.aio.server(interceptors=[calls], options=[("grpc.so_reuseport", 0)])
        if draining is None:
            shapes.add_to(server)
        else:
            calls_host = CallHost(metrics, draining)
            shapes.add_to(calls_host.beside(server))
            calls_pb2_grpc.add_CallServiceServicer_to_server(calls_host, server)

        async def healthy() -> None:
            return None

        health = HealthMonitor([SERVICE], healthy, metrics)
        health_pb2_grpc.add_HealthServicer_to_server(health.servicer, server)
        port = server.add_insecure_port(f"{host}:{port}")
        await server.start()
        health.servicer.set(["", SERVICE], SERVING)
        self.stack.push_async_callback(server.stop, 0)
        return Replica(shapes, server, health, metrics, calls, port)

    def connect(self, *replicas: Replica, carries_calls: bool = False) -> ShapesStub:
        return ShapesStub(self.channel(*replicas, carries_calls=carries_calls))

    def channel(self, *replicas: Replica, carries_calls: bool = False) -> MeshChannel:
        addresses = ",".join(f"127.0.0.1:{replica.port}" for replica in replicas)
        return self.channel_to(f"ipv4:{addresses}", carries_calls=carries_calls)

    def channel_to(self, target: str, **options: Any) -> MeshChannel:
        channel = connect(
            target, peer="shapes", health_service=SERVICE, metrics=self.metrics, **options
        )
        self.stack.push_async_callback(channel.close)
        return channel


@pytest.fixture
async def loopback() -> AsyncIterator[Loopback]:
    async with AsyncExitStack() as stack:
        yield Loopback(stack)


@pytest.fixture
def counted() -> Callable[[Metrics, str, str, str], float]:
    """How often a call ended with a code, as Prometheus sees it."""

    def read(metrics: Metrics, side: str, method: str, code: str) -> float:
        name = f"meshserve_rpc_{side}_calls_total"
        labels = {"method": f"{SERVICE}/{method}", "code": code}
        return metrics.registry.get_sample_value(name, labels) or 0.0

    return read
