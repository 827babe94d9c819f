"""A gateway before several scripted engines that load and unload models and adapters."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any, Self

import grpc

from meshserve.v1 import admin_pb2_grpc, engine_pb2, engine_pb2_grpc
from services.runtime.errors import Reason, ServiceError, invalid_field
from services.runtime.server_calls import CallInterceptor
from services.runtime.telemetry import Metrics
from tests.fakes.scripted_mesh import (
    MODEL,
    Engine,
    EngineRequest,
    EngineResponse,
    ScriptedMesh,
    chunk,
    complete,
    encode,
)
from tests.support.ports import free_ports

READY = engine_pb2.MODEL_STATE_READY
SLEEPING = engine_pb2.MODEL_STATE_SLEEPING
UNLOADED = engine_pb2.MODEL_STATE_UNLOADED
FAILED = engine_pb2.MODEL_STATE_FAILED
OWN = "own"


class HostingEngine(Engine):
    """Says which adapter it answers with, and what it was asked for in `asked`.

    A source that begins with `/broken` cannot be loaded, nor can anything while `fails` is set.
    What is asked for waits until `may_load` is set, as it is at first.
    """

    def __init__(self) -> None:
        super().__init__()
        self.script = self._says_adapter
        self.fails = False
        self.may_load = asyncio.Event()
        self.may_load.set()
        self.start_anew()

    def start_anew(self) -> None:
        """Has what its settings say, as after a restart."""
        self.asked: list[str] = []
        self.models = {MODEL: engine_pb2.EngineModel(name=MODEL, state=READY, adapters=[OWN])}

    @property
    def adapters(self) -> list[str]:
        return sorted(self.models[MODEL].adapters)

    async def _says_adapter(self, request: EngineRequest) -> AsyncIterator[EngineResponse]:
        model = self.models[MODEL]
        if model.state not in (READY, SLEEPING):
            raise ServiceError(Reason.MODEL_NOT_LOADED, "not here")
        if request.adapter and request.adapter not in model.adapters:
            raise ServiceError(Reason.ADAPTER_NOT_FOUND, "not here")
        model.state = READY
        yield chunk((0, encode(request.adapter or "base")))
        yield complete(0)

    async def _ask(self, kind: str, request: Any) -> engine_pb2.EngineModel:
        self.asked.append(f"{kind} {getattr(request, 'adapter', '') or request.model}")
        await self.may_load.wait()
        if self.fails:
            raise ServiceError(Reason.INTERNAL, "no room")
        return self.models[request.model]

    async def ListModels(self, request: Any, context: Any) -> Any:
        return engine_pb2.EngineServiceListModelsResponse(models=self.models.values())

    async def LoadModel(self, request: Any, context: Any) -> Any:
        model = await self._ask("load", request)
        model.state = READY
        return engine_pb2.LoadModelResponse(model=model)

    async def UnloadModel(self, request: Any, context: Any) -> Any:
        model = await self._ask("unload", request)
        model.state = UNLOADED
        del model.adapters[:]
        return engine_pb2.UnloadModelResponse(aborted_requests=1)

    async def SleepModel(self, request: Any, context: Any) -> Any:
        model = await self._ask("sleep", request)
        model.state = SLEEPING
        return engine_pb2.SleepModelResponse(freed_bytes=1000)

    async def WakeModel(self, request: Any, context: Any) -> Any:
        model = await self._ask("wake", request)
        model.state = READY
        return engine_pb2.WakeModelResponse(model=model)

    async def LoadAdapter(self, request: Any, context: Any) -> Any:
        model = await self._ask("load", request)
        if request.source.startswith("/broken"):
            raise invalid_field("source", "has no adapter_config.json")
        model.adapters.append(request.adapter)
        return engine_pb2.LoadAdapterResponse(size_bytes=7)

    async def UnloadAdapter(self, request: Any, context: Any) -> Any:
        model = await self._ask("unload", request)
        model.adapters.remove(request.adapter)
        return engine_pb2.UnloadAdapterResponse()


class HostingMesh(ScriptedMesh):
    """Enter it to start; `admin` is for operators."""

    def __init__(self, folder: Path, engines: int = 2, **sections: Any) -> None:
        self.engines = [HostingEngine() for _ in range(engines)]
        self._engine_ports = free_ports(engines)
        self._engine_servers: dict[int, grpc.aio.Server] = {}
        target = "ipv4:" + ",".join(f"127.0.0.1:{port}" for port in self._engine_ports)
        super().__init__(folder, **{"engine": {"target": target}, **sections})

    async def __aenter__(self) -> Self:
        for number in range(len(self.engines)):
            await self.start_engine(number)
        await super().__aenter__()
        self.admin = admin_pb2_grpc.AdminServiceStub(self.channel)
        return self

    async def stop_all(self) -> None:
        await super().stop_all()
        for number in list(self._engine_servers):
            await self.kill_engine(number)

    async def start_engine(self, number: int) -> None:
        server = grpc.aio.server(
            interceptors=[CallInterceptor(Metrics("engine"))], options=[("grpc.so_reuseport", 0)]
        )
        engine_pb2_grpc.add_EngineServiceServicer_to_server(self.engines[number], server)
        server.add_insecure_port(f"127.0.0.1:{self._engine_ports[number]}")
        await server.start()
        self._engine_servers[number] = server

    async def kill_engine(self, number: int) -> None:
        await self._engine_servers.pop(number).stop(0)

    async def answer(self, model: str = "", adapter: str = "") -> str:
        """The adapter that answers, as its engine knows it."""
        response = await self.generate(model=model, adapter=adapter)
        return response.choices[0].text
