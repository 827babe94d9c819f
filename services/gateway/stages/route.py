"""Which model, adapter and engines: names resolved, defaults of the model filled in."""

from __future__ import annotations

from meshserve.v1 import types_pb2
from services.gateway.context import RequestContext
from services.gateway.models import ModelDirectory
from services.gateway.pipeline import Stage


class Route(Stage):
    """Sets the model, the adapter by the name that engines know, and the sampling parameters that
    the request leaves to the model."""

    name = "route"

    def __init__(self, models: ModelDirectory) -> None:
        self._models = models

    async def before(self, context: RequestContext) -> None:
        """Raises ServiceError (NOT_FOUND, PERMISSION_DENIED, UNIMPLEMENTED, FAILED_PRECONDITION,
        UNAVAILABLE)."""
        request = context.request
        needed = (
            types_pb2.MODEL_CAPABILITY_CHAT
            if request.WhichOneof("input") == "conversation"
            else types_pb2.MODEL_CAPABILITY_GENERATE
        )
        name, adapter = self._models.find_allowed(
            request.model, request.adapter, context.tenant.models, needed
        )
        model = await self._models.resolve(name)
        model.check_can(needed)
        if adapter:
            context.adapter = adapter
            context.span.set_attribute("meshserve.adapter", adapter)
            request.adapter = self._models.hosting.engine_name(name, adapter)
        if not request.model:
            context.span.update_name(f"{context.operation} {name}")
            context.span.set_attribute("gen_ai.request.model", name)
        request.model = name
        _fill_in(request.sampling, model.info.default_sampling)
        context.model = model


def _fill_in(sampling: types_pb2.SamplingParams, defaults: types_pb2.SamplingParams) -> None:
    """Sets the scalar fields that are absent to the model's own defaults."""
    for field, value in defaults.ListFields():
        if field.has_presence and not sampling.HasField(field.name):  # type: ignore[arg-type]
            setattr(sampling, field.name, value)
