"""One inference request from its arrival to its end: context, span, metrics, errors."""

from __future__ import annotations

import time
import uuid
from collections.abc import AsyncGenerator, Iterable
from contextlib import aclosing
from typing import Any, Literal

from opentelemetry.trace import Status, StatusCode, use_span

from meshserve.v1 import gateway_pb2, types_pb2
from services.gateway.context import RequestContext
from services.gateway.events import Event
from services.gateway.field_paths import under_request
from services.gateway.pipeline import Pipeline
from services.runtime import deadline
from services.runtime.errors import Reason, ServiceError
from services.runtime.settings import GatewaySettings
from services.runtime.telemetry import Metrics, get_tracer

UNROUTED = "unknown"


class Inference:
    """Runs requests through the pipeline and records how they went."""

    def __init__(self, settings: GatewaySettings, pipeline: Pipeline, metrics: Metrics) -> None:
        self._settings = settings
        self._pipeline = pipeline
        self._tracer = get_tracer()
        self._requests = metrics.counter("meshserve_gateway_requests")
        self._duration = metrics.histogram("meshserve_gateway_request_duration_seconds")

    def begin(
        self,
        request: gateway_pb2.GenerateRequest,
        operation: Literal["chat", "text_completion"],
        metadata: Iterable[tuple[str, Any]],
        *,
        streaming: bool,
    ) -> RequestContext:
        """The context of a request that has just arrived. `request` is changed on its way."""
        if deadline.remaining_s() is None:
            deadline.set_remaining(self._settings.default_timeout_s)
        request_id = request.request_id or uuid.uuid4().hex
        span = self._tracer.start_span(
            f"{operation} {request.model}".rstrip(),
            attributes=_request_attributes(request, operation, request_id, streaming),
        )
        return RequestContext(
            request=request,
            operation=operation,
            streaming=streaming,
            metadata={key: value for key, value in metadata if isinstance(value, str)},
            request_id=request_id,
            span=span,
        )

    async def run(self, context: RequestContext) -> AsyncGenerator[Event]:
        """The events of a request. Raises ServiceError, which then carries the request's id."""
        reason = ""
        with use_span(context.span, record_exception=False, set_status_on_exception=False):
            try:
                async with aclosing(self._pipeline.run(context)) as events:
                    async for event in events:
                        yield event
            except ServiceError as error:
                reason = error.reason.value
                error.metadata.setdefault("request_id", context.request_id)
                if context.streaming:
                    under_request(error)
                raise
            except Exception:
                reason = Reason.INTERNAL.value
                raise
            except BaseException:
                late = deadline.remaining_s() == 0
                reason = (Reason.DEADLINE_EXCEEDED if late else Reason.CANCELLED).value
                context.span.set_attribute("meshserve.cancelled", True)
                raise
            finally:
                self._end(context, reason)

    async def drain(self) -> None:
        """Waits for what outlives cancelled requests."""
        await self._pipeline.drain()

    def _end(self, context: RequestContext, reason: str) -> None:
        model = context.model.name if context.model is not None else UNROUTED
        if reason:
            context.span.set_attribute("error.type", reason)
            context.span.set_status(Status(StatusCode.ERROR, reason))
        context.span.end()
        self._requests.labels(model, context.tenant.name, reason).inc()
        self._duration.labels(model).observe(time.perf_counter() - context.arrived_at)


def _request_attributes(
    request: gateway_pb2.GenerateRequest, operation: str, request_id: str, streaming: bool
) -> dict[str, str | int | float | bool]:
    sampling: types_pb2.SamplingParams = request.sampling
    attributes: dict[str, str | int | float | bool] = {
        "gen_ai.operation.name": operation,
        "gen_ai.provider.name": "meshserve",
        "gen_ai.request.model": request.model[:128],
        "gen_ai.response.id": request_id[:128],
        "gen_ai.request.stream": streaming,
    }
    if request.stopping.HasField("max_tokens"):
        attributes["gen_ai.request.max_tokens"] = request.stopping.max_tokens
    for field, name in (
        ("temperature", "gen_ai.request.temperature"),
        ("top_p", "gen_ai.request.top_p"),
        ("top_k", "gen_ai.request.top_k"),
        ("seed", "gen_ai.request.seed"),
        ("n", "gen_ai.request.choice.count"),
    ):
        if sampling.HasField(field):  # type: ignore[arg-type]
            attributes[name] = _representable(getattr(sampling, field))
    return attributes


def _representable(value: float) -> float:
    # OpenTelemetry's integers are signed 64-bit numbers; a seed may be larger.
    return value if not isinstance(value, int) or value < 2**63 else value - 2**64
