"""The RPCs that bring models into an engine's memory and out of it, and say where they are."""

from __future__ import annotations

from typing import Any

import grpc

from meshserve.v1 import engine_pb2, engine_pb2_grpc
from services.engine.hosted_model import HostedModel, State
from services.engine.hosting import Hosting
from services.engine.refusals import not_loaded_error
from services.runtime.errors import invalid_field

DEFAULT_DRAIN_TIMEOUT_MS = 30_000
MAX_DRAIN_TIMEOUT_MS = 3_600_000

_STATES = {
    State.UNLOADED: engine_pb2.MODEL_STATE_UNLOADED,
    State.LOADING: engine_pb2.MODEL_STATE_LOADING,
    State.READY: engine_pb2.MODEL_STATE_READY,
    State.SLEEPING: engine_pb2.MODEL_STATE_SLEEPING,
    State.WAKING: engine_pb2.MODEL_STATE_SLEEPING,
    State.DRAINING: engine_pb2.MODEL_STATE_DRAINING,
    State.FAILED: engine_pb2.MODEL_STATE_FAILED,
}


class LifecycleServicer(engine_pb2_grpc.EngineServiceServicer):
    """Answers for the models of one engine."""

    def __init__(self, models: Hosting) -> None:
        self._models = models

    async def ListModels(  # noqa: N802
        self,
        request: engine_pb2.EngineServiceListModelsRequest,
        context: grpc.aio.ServicerContext[
            engine_pb2.EngineServiceListModelsRequest, engine_pb2.EngineServiceListModelsResponse
        ],
    ) -> engine_pb2.EngineServiceListModelsResponse:
        """All models, whatever their state."""
        return engine_pb2.EngineServiceListModelsResponse(
            models=map(engine_model, self._models.models)
        )

    async def LoadModel(  # noqa: N802
        self,
        request: engine_pb2.LoadModelRequest,
        context: grpc.aio.ServicerContext[
            engine_pb2.LoadModelRequest, engine_pb2.LoadModelResponse
        ],
    ) -> engine_pb2.LoadModelResponse:
        """Loads a model, if it is not there. The load goes on when the caller goes away."""
        model = self._named(request)
        await model.load()
        return engine_pb2.LoadModelResponse(model=engine_model(model))

    async def UnloadModel(  # noqa: N802
        self,
        request: engine_pb2.UnloadModelRequest,
        context: grpc.aio.ServicerContext[
            engine_pb2.UnloadModelRequest, engine_pb2.UnloadModelResponse
        ],
    ) -> engine_pb2.UnloadModelResponse:
        """Unloads a model once its requests have ended."""
        aborted = await self._named(request).unload(seconds_to_drain(request))
        return engine_pb2.UnloadModelResponse(aborted_requests=aborted)

    async def SleepModel(  # noqa: N802
        self,
        request: engine_pb2.SleepModelRequest,
        context: grpc.aio.ServicerContext[
            engine_pb2.SleepModelRequest, engine_pb2.SleepModelResponse
        ],
    ) -> engine_pb2.SleepModelResponse:
        """Puts an idle model to sleep."""
        return engine_pb2.SleepModelResponse(freed_bytes=await self._named(request).sleep())

    async def WakeModel(  # noqa: N802
        self,
        request: engine_pb2.WakeModelRequest,
        context: grpc.aio.ServicerContext[
            engine_pb2.WakeModelRequest, engine_pb2.WakeModelResponse
        ],
    ) -> engine_pb2.WakeModelResponse:
        """Wakes a model that sleeps; one that is unloaded has to be loaded."""
        model = self._named(request)
        await model.wake()
        if model.state is not State.READY:
            raise not_loaded_error(model.name, model.state.value)
        return engine_pb2.WakeModelResponse(model=engine_model(model))

    def _named(self, request: Any) -> HostedModel:
        if not request.model:
            raise invalid_field("model", "required")
        return self._models.find(request.model)


def engine_model(model: HostedModel) -> engine_pb2.EngineModel:
    """A model as its engine sees it."""
    problem = model.problem
    if model.state is State.READY and not model.client.is_ready:
        problem = "its core ended, and is being replaced"
    return engine_pb2.EngineModel(
        name=model.name,
        state=_STATES[model.state],
        problem=problem,
        memory_bytes=model.memory_bytes,
        adapters=sorted(model.client.adapters.names),
        requests=model.num_requests,
    )


def seconds_to_drain(request: Any) -> float:
    """How long requests in flight may go on, of a request with `timeout_ms`. Raises
    ServiceError."""
    timeout_ms = request.timeout_ms if request.HasField("timeout_ms") else DEFAULT_DRAIN_TIMEOUT_MS
    if timeout_ms > MAX_DRAIN_TIMEOUT_MS:
        raise invalid_field("timeout_ms", f"at most {MAX_DRAIN_TIMEOUT_MS}")
    return float(timeout_ms / 1000)
