"""Which model and which engines answer a request to an encoder."""

from __future__ import annotations

from meshserve.v1 import gateway_pb2
from services.gateway.encoding.context import EncodingContext
from services.gateway.models import ModelDirectory, ServedModel
from services.gateway.pipeline import Step
from services.runtime.errors import Reason, ServiceError, invalid_field

_COMPONENT_BYTES = 4
# Beside its components, in the largest answer.
_EMBEDDING_OVERHEAD_BYTES = 16


class RouteEncoding(Step[EncodingContext]):
    """Sets the model, and refuses what it cannot do."""

    name = "route"

    def __init__(self, models: ModelDirectory, max_message_bytes: int) -> None:
        self._models = models
        self._max_message_bytes = max_message_bytes

    async def before(self, context: EncodingContext) -> None:
        """Raises ServiceError (NOT_FOUND, PERMISSION_DENIED, UNIMPLEMENTED, UNAVAILABLE,
        INVALID_ARGUMENT)."""
        request, capability = context.request, context.task.capability
        name, adapter = self._models.find_allowed(
            request.model, "", context.tenant.models, capability
        )
        model = await self._models.resolve(name)
        model.check_can(capability)
        if adapter:
            raise ServiceError(
                Reason.CAPABILITY_MISSING,
                f"adapters generate text; {context.operation} takes a model alone",
                metadata={"capability": "adapters"},
            )
        if isinstance(request, gateway_pb2.EmbedRequest):
            self._check_size(request, model)
        if not request.model:
            context.span.update_name(f"{context.operation} {name}")
            context.span.set_attribute("gen_ai.request.model", name)
        context.model = model

    def _check_size(self, request: gateway_pb2.EmbedRequest, model: ServedModel) -> None:
        whole = model.info.embedding_size
        if request.dimensions > whole:
            raise invalid_field("dimensions", f"must lie in [1, {whole}]")
        size_bytes = _COMPONENT_BYTES * (request.dimensions or whole) + _EMBEDDING_OVERHEAD_BYTES
        most = self._max_message_bytes // size_bytes
        if len(request.texts) > most:
            raise invalid_field(
                "texts", f"an answer holds at most {most} vectors of this model; ask in parts"
            )
