"""The RPCs that load adapters of an engine's models, and unload them."""

from __future__ import annotations

import asyncio
from pathlib import Path

import grpc

from meshserve.v1 import engine_pb2
from services.engine.adapters import AdapterError
from services.engine.hosted_model import HostedModel
from services.engine.hosting import Hosting
from services.engine.lifecycle import LifecycleServicer
from services.engine.refusals import adapter_error, as_service_error, unavailable_error
from services.engine.request_stream import CoreLostError, CoreUnavailableError
from services.engine.validation import missing_capability
from services.runtime.errors import ServiceError, invalid_field
from services.runtime.modelfiles import ModelStoreError, locate_adapter

MAX_ADAPTER_NAME_CHARS = 256


class AdapterServicer(LifecycleServicer):
    """Answers for the adapters of the models of one engine."""

    def __init__(self, models: Hosting, model_cache: Path | None) -> None:
        super().__init__(models)
        self._model_cache = model_cache

    async def LoadAdapter(  # noqa: N802
        self,
        request: engine_pb2.LoadAdapterRequest,
        context: grpc.aio.ServicerContext[
            engine_pb2.LoadAdapterRequest, engine_pb2.LoadAdapterResponse
        ],
    ) -> engine_pb2.LoadAdapterResponse:
        """Loads an adapter. The load goes on when the caller goes away."""
        model = await self._adapted(request.model, request.adapter)
        if not request.source:
            raise invalid_field("source", "required")
        try:
            path = await asyncio.to_thread(locate_adapter, request.source, self._model_cache)
        except ModelStoreError as error:
            raise invalid_field("source", f"{error.problem} {error.way_out}") from None
        try:
            size_bytes = await model.client.adapters.load(request.adapter, str(path))
        except (AdapterError, CoreLostError, CoreUnavailableError) as error:
            raise _as_service_error(error) from None
        return engine_pb2.LoadAdapterResponse(size_bytes=size_bytes)

    async def UnloadAdapter(  # noqa: N802
        self,
        request: engine_pb2.UnloadAdapterRequest,
        context: grpc.aio.ServicerContext[
            engine_pb2.UnloadAdapterRequest, engine_pb2.UnloadAdapterResponse
        ],
    ) -> engine_pb2.UnloadAdapterResponse:
        """Unloads an adapter once no request uses it; new ones may not from here on."""
        model = await self._adapted(request.model, request.adapter)
        try:
            await model.client.adapters.unload(request.adapter)
        except (AdapterError, CoreLostError, CoreUnavailableError) as error:
            raise _as_service_error(error) from None
        return engine_pb2.UnloadAdapterResponse()

    async def _adapted(self, model_name: str, adapter: str) -> HostedModel:
        model = self._models.find(model_name)
        if not 0 < len(adapter) <= MAX_ADAPTER_NAME_CHARS:
            raise invalid_field("adapter", f"between 1 and {MAX_ADAPTER_NAME_CHARS} characters")
        await model.wake()
        model.check_ready()
        if not model.facts().takes_adapters:
            raise missing_capability("adapters", "this model runs without adapters")
        return model


def _as_service_error(error: Exception) -> ServiceError:
    if isinstance(error, AdapterError):
        return adapter_error(error)
    if isinstance(error, CoreLostError):
        return as_service_error(error)
    return unavailable_error(str(error))
