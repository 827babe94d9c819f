"""OpenTelemetry set-up: who we are, where spans go, and the W3 context on gRPC metadata."""

from __future__ import annotations

import logging
import os
import socket
import threading
from collections.abc import Iterable, Mapping, Sequence
from contextvars import Token
from functools import cache
from importlib.metadata import version

from opentelemetry import context as otel_context
from opentelemetry import propagate, trace
from opentelemetry.context import Context
from opentelemetry.exporter.otlp.proto.grpc.trace_exporter import OTLPSpanExporter
from opentelemetry.propagators.composite import CompositePropagator
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor
from opentelemetry.sdk.trace.sampling import (
    Decision,
    ParentBased,
    Sampler,
    SamplingResult,
    TraceIdRatioBased,
)
from opentelemetry.trace import Link, SpanKind, TraceState
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator
from opentelemetry.util.types import Attributes

from meshserve.v1 import types_pb2
from services.runtime.errors import ServiceError
from services.runtime.reasons import REASONS
from services.runtime.settings import TelemetrySettings
from services.runtime.settings.addresses import UNIX_SOCKET, split_address
from services.runtime.telemetry.openinference import OpenInferenceKinds

# The exporter retries by itself; its warnings at every failed batch say nothing new.
EXPORTER_LOGGER = "opentelemetry.exporter.otlp.proto.grpc.exporter"
EXPORT_INTERVAL_MS = 1000
SHUTDOWN_TIMEOUT_S = 2.0
MAX_DETAIL_CHARS = 256


class Tracing:
    """The process's tracer provider; `shutdown` sends what has not been sent."""

    def __init__(self, provider: TracerProvider | None) -> None:
        self._provider = provider

    def shutdown(self) -> None:
        """Sends what is left and stops the exporter. Waits a few seconds at most."""
        if self._provider is None:
            return
        # The exporter waits out its retries whatever timeout it is given, so it is left behind in a
        # thread that does not keep the process.
        sending = threading.Thread(target=self._provider.shutdown, daemon=True)
        sending.start()
        sending.join(SHUTDOWN_TIMEOUT_S)


class _TracesOfRequests(Sampler):
    """Begins traces with what is asked of us, for a share of them. A call that we make for no
    request, such as the look at what a peer serves, begins none: there are many of them, and they
    would bury the rest."""

    def __init__(self, ratio: float) -> None:
        self._share = TraceIdRatioBased(ratio)

    def should_sample(
        self,
        parent_context: Context | None,
        trace_id: int,
        name: str,
        kind: SpanKind | None = None,
        attributes: Attributes = None,
        links: Sequence[Link] | None = None,
        trace_state: TraceState | None = None,
    ) -> SamplingResult:
        """Called by the SDK for a span that has no parent."""
        if kind is not SpanKind.SERVER:
            return SamplingResult(Decision.DROP)
        return self._share.should_sample(
            parent_context, trace_id, name, kind, attributes, links, trace_state
        )

    def get_description(self) -> str:
        """Called by the SDK."""
        return f"TracesOfRequests{{{self._share.rate}}}"


def configure_tracing(service: str, settings: TelemetrySettings) -> Tracing:
    """Makes spans go to an OTLP receiver; without an endpoint only the context travels on."""
    endpoint = settings.otlp_endpoint
    propagate.set_global_textmap(CompositePropagator([TraceContextTextMapPropagator()]))
    if endpoint is None:
        return Tracing(None)
    logging.getLogger(EXPORTER_LOGGER).setLevel(logging.ERROR)
    resource = Resource.create(
        {
            "service.name": f"meshserve-{service}",
            "service.namespace": "meshserve",
            "service.version": _version(),
            "service.instance.id": f"{socket.gethostname()}:{os.getpid()}",
        }
    )
    provider = TracerProvider(
        resource=resource,
        sampler=ParentBased(_TracesOfRequests(settings.sample_ratio)),
        shutdown_on_exit=False,
    )
    if settings.openinference:
        provider.add_span_processor(OpenInferenceKinds())
    exporter = OTLPSpanExporter(endpoint=endpoint, insecure=not endpoint.startswith("https://"))
    provider.add_span_processor(
        BatchSpanProcessor(exporter, schedule_delay_millis=EXPORT_INTERVAL_MS)
    )
    trace.set_tracer_provider(provider)
    return Tracing(provider)


@cache
def get_tracer() -> trace.Tracer:
    """The tracer of MeshServe; spans it makes are named in services/runtime/telemetry/spans.py."""
    return trace.get_tracer("meshserve", _version())


@cache
def _version() -> str:
    # Read from the installed metadata, which is parsed anew each time.
    return version("meshserve")


def extract_context(metadata: Iterable[tuple[str, str | bytes]]) -> Context:
    """The caller's trace context from gRPC metadata."""
    carrier = {
        key: value
        for key, value in metadata
        if key in ("traceparent", "tracestate") and isinstance(value, str)
    }
    return propagate.extract(carrier, Context()) if carrier else Context()


def metadata_of(span: trace.Span) -> tuple[tuple[str, str], ...]:
    """The trace context of a span, as metadata of a call."""
    if not span.get_span_context().is_valid:
        return ()
    carrier: dict[str, str] = {}
    propagate.inject(carrier, trace.set_span_in_context(span))
    return tuple(carrier.items())


def trace_context_of(span: trace.Span) -> types_pb2.TraceContext:
    """The trace context of a span as a message, for a session on a shared stream."""
    return types_pb2.TraceContext(**dict(metadata_of(span)))


def context_of(message: types_pb2.TraceContext) -> Context:
    """The trace context that a session on a shared stream was opened with."""
    if not message.traceparent:
        return Context()
    carrier: Mapping[str, str] = {
        "traceparent": message.traceparent,
        "tracestate": message.tracestate,
    }
    return propagate.extract({k: v for k, v in carrier.items() if v}, Context())


class in_span:  # noqa: N801 - reads as what it does: `with in_span(span):`
    """Makes a span the current one for a while. One that is not recorded needs no place: what is
    done for it belongs to the trace that it was begun in, and is recorded as little."""

    def __init__(self, span: trace.Span) -> None:
        self._span = span
        self._token: Token[Context] | None = None

    def __enter__(self) -> None:
        if self._span.is_recording():
            self._token = otel_context.attach(trace.set_span_in_context(self._span))

    def __exit__(self, *_: object) -> None:
        if self._token is not None:
            otel_context.detach(self._token)


def server_attributes(address: str) -> dict[str, str | int]:
    """What a span tells of where a server listens: `HOST:PORT`, or a unix socket."""
    if address.startswith(UNIX_SOCKET):
        return {"server.address": address.partition(":")[2]}
    host, port = split_address(address)
    return {"server.address": host, "server.port": port}


def mark_failed(span: trace.Span, error: ServiceError, at_ns: int | None = None) -> None:
    """Gives a span the status of an error, and an `exception` event that tells what it means.

    The error's own message stays out, for it may quote what the caller sent; neither the meaning of
    its reason nor its metadata and the paths of its fields do. `at_ns` is the time of the event.
    """
    if not span.is_recording():
        return
    reason = error.reason.value
    attributes: dict[str, str | list[str]] = {
        "exception.type": reason,
        "exception.message": REASONS[error.reason].meaning,
    }
    if error.metadata:
        details = [f"{key}={value}" for key, value in error.metadata.items()]
        attributes["meshserve.error.details"] = [each[:MAX_DETAIL_CHARS] for each in details]
    if error.field_violations:
        attributes["meshserve.error.fields"] = [path for path, _ in error.field_violations]
    span.set_attribute("error.type", reason)
    span.set_status(trace.Status(trace.StatusCode.ERROR, reason))
    span.add_event("exception", attributes, at_ns)


def current_context() -> Context:
    """The OpenTelemetry context of the running task."""
    return otel_context.get_current()
