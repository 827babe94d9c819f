"""The engine's RPCs over a core process, without the rest of a service."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from typing import Any

import grpc

from meshserve.v1 import engine_pb2_grpc
from services.engine.core_client import CoreClient
from services.engine.hosted_model import HostedModel, State
from services.engine.hosting import Hosting
from services.engine.metrics import StepMetrics, read_models
from services.engine.servicer import EngineServicer
from services.runtime.server_calls import CallInterceptor
from services.runtime.telemetry import Metrics


@dataclass
class EngineServer:
    """What a test holds of it. `stub` is the asyncio form of EngineServiceStub."""

    stub: Any
    client: CoreClient
    metrics: Metrics
    draining: asyncio.Event = field(default_factory=asyncio.Event)


@contextlib.asynccontextmanager
async def engine_server(settings: Any, **client_options: Any) -> AsyncIterator[EngineServer]:
    """A started core and a server in front of it, for a model called `m`."""
    metrics = Metrics("engine")
    client = CoreClient(settings, on_step=StepMetrics(metrics, "m").observe, **client_options)
    await client.start()
    models = Hosting([HostedModel("m", client, state=State.READY)])
    read_models(metrics, models)
    draining = asyncio.Event()
    server = grpc.aio.server(interceptors=[CallInterceptor(metrics)])
    servicer = EngineServicer(
        models,
        metrics,
        draining=draining,
        max_inputs=settings.batcher.max_waiting_sequences,
    )
    engine_pb2_grpc.add_EngineServiceServicer_to_server(servicer, server)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
        yield EngineServer(engine_pb2_grpc.EngineServiceStub(channel), client, metrics, draining)
    await server.stop(0)
    await client.close()
