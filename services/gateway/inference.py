"""One inference request from its arrival to its end: context, span, metrics, errors."""

from __future__ import annotations

import time
import uuid
from collections.abc import AsyncGenerator, Iterable, Iterator
from contextlib import aclosing, contextmanager
from typing import Any, Literal

from opentelemetry.trace import Span

from meshserve.v1 import gateway_pb2, types_pb2
from services.gateway.context import CallContext, Operation, RequestContext
from services.gateway.events import Event
from services.gateway.field_paths import under_request
from services.gateway.pipeline import Pipeline, departure
from services.gateway.recent import RecentRequests
from services.runtime import deadline
from services.runtime.errors import Reason, ServiceError
from services.runtime.settings import GatewaySettings
from services.runtime.telemetry import Metrics, exemplar_of, get_tracer
from services.runtime.telemetry.tracing import in_span, mark_failed, server_attributes

Attributes = dict[str, str | int | float | bool]

UNROUTED = "unknown"
MAX_ATTRIBUTE_CHARS = 128


class Inference:
    """Runs requests through the pipeline and records how they went; `recent` holds the last."""

    def __init__(
        self, settings: GatewaySettings, pipeline: Pipeline[RequestContext], metrics: Metrics
    ) -> None:
        self._settings = settings
        self._pipeline = pipeline
        self.recent = RecentRequests()
        self._tracer = get_tracer()
        self._server = server_attributes(settings.listen)
        self._requests = metrics.counter("meshserve_gateway_requests")
        self._duration = metrics.histogram("meshserve_gateway_request_duration_seconds")

    @contextmanager
    def request(
        self,
        request: gateway_pb2.GenerateRequest,
        operation: Literal["chat", "text_completion"],
        metadata: Iterable[tuple[str, Any]],
        *,
        streaming: bool,
    ) -> Iterator[RequestContext]:
        """The context of a request that has just arrived, whose span and count end with the block.

        `request` is changed on its way. A ServiceError of the block gets the request's id.
        """
        request_id = request.request_id or new_request_id()
        context = RequestContext(
            request=request,
            operation=operation,
            streaming=streaming,
            metadata=text_metadata(metadata),
            request_id=request_id,
            span=self.span(
                operation, request.model, request_id, _request_attributes(request, streaming)
            ),
        )
        with self.under_way(context):
            yield context

    def span(
        self, operation: Operation, model: str, request_id: str, attributes: Attributes
    ) -> Span:
        """The span of a request that has just arrived."""
        named = model[:MAX_ATTRIBUTE_CHARS]
        return self._tracer.start_span(
            f"{operation} {named}".rstrip(),
            attributes={
                **self._server,
                "gen_ai.operation.name": operation,
                "gen_ai.provider.name": "meshserve",
                "gen_ai.request.model": named,
                "gen_ai.response.id": request_id[:MAX_ATTRIBUTE_CHARS],
                **attributes,
            },
        )

    @contextmanager
    def under_way(self, context: CallContext) -> Iterator[None]:
        """A block in which a request of any kind is worked on, whose span and count end with it. A
        ServiceError of the block gets the request's id."""
        if deadline.remaining_s() is None:
            deadline.set_remaining(self._settings.default_timeout_s)
        number = self.recent.begin(context)
        failure: ServiceError | None = None
        with in_span(context.span):
            try:
                yield
            except ServiceError as error:
                failure = error
                error.metadata.setdefault("request_id", context.request_id)
                raise
            except Exception as error:
                failure = ServiceError(Reason.INTERNAL, str(error))
                raise
            except BaseException:
                failure = departure()
                context.span.set_attribute("meshserve.cancelled", True)
                raise
            finally:
                self._end(context, failure)
                self.recent.end(number, failure.reason.value if failure is not None else "")

    async def events(self, context: RequestContext) -> AsyncGenerator[Event]:
        """The events of a request. Raises ServiceError."""
        async with aclosing(self._pipeline.run(context)) as events:
            try:
                async for event in events:
                    yield event
            except ServiceError as error:
                if context.streaming:
                    under_request(error)
                raise

    async def drain(self) -> None:
        """Waits for what outlives cancelled requests."""
        await self._pipeline.drain()

    def _end(self, context: CallContext, error: ServiceError | None) -> None:
        model = context.model.name if context.model is not None else UNROUTED
        reason = error.reason.value if error is not None else ""
        if error is not None:
            if error.reason is Reason.CANCELLED:
                # A caller may change its mind; that is no failure.
                context.span.add_event("cancelled")
            else:
                mark_failed(context.span, error)
        exemplar = exemplar_of(context.span)
        context.span.end()
        self._requests.labels(model, context.tenant.name, reason).inc()
        self._duration.labels(model).observe(time.perf_counter() - context.arrived_at, exemplar)


def new_request_id() -> str:
    """An id for a request that came without one."""
    return uuid.uuid4().hex


def text_metadata(metadata: Iterable[tuple[str, Any]]) -> dict[str, str]:
    """The entries of a call's metadata that are text."""
    return {key: value for key, value in metadata if isinstance(value, str)}


def _request_attributes(request: gateway_pb2.GenerateRequest, streaming: bool) -> Attributes:
    sampling: types_pb2.SamplingParams = request.sampling
    attributes: Attributes = {"gen_ai.request.stream": streaming}
    if request.stopping.HasField("max_tokens"):
        attributes["gen_ai.request.max_tokens"] = request.stopping.max_tokens
    for field, name in (
        ("temperature", "gen_ai.request.temperature"),
        ("top_p", "gen_ai.request.top_p"),
        ("top_k", "gen_ai.request.top_k"),
        ("frequency_penalty", "gen_ai.request.frequency_penalty"),
        ("presence_penalty", "gen_ai.request.presence_penalty"),
        ("seed", "gen_ai.request.seed"),
        ("n", "gen_ai.request.choice.count"),
    ):
        if sampling.HasField(field):  # type: ignore[arg-type]
            attributes[name] = _representable(getattr(sampling, field))
    return attributes


def _representable(value: float) -> float:
    # OpenTelemetry's integers are signed 64-bit numbers; a seed may be larger.
    return value if not isinstance(value, int) or value < 2**63 else value - 2**64
