"""Which traces are begun, and what a span tells of an error."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from opentelemetry import trace
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import SpanKind, TraceFlags

from services.runtime.errors import Reason, ServiceError
from services.runtime.settings import TelemetrySettings
from services.runtime.telemetry import tracing
from services.runtime.telemetry.tracing import (
    configure_tracing,
    mark_failed,
    metadata_of,
    server_attributes,
)


class Recorded:
    """A provider that is set up as a service sets it up, whose spans stay here."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, **settings: object) -> None:
        providers: list[TracerProvider] = []
        monkeypatch.setattr(trace, "set_tracer_provider", providers.append)
        monkeypatch.setattr(tracing, "OTLPSpanExporter", lambda **_: InMemorySpanExporter())
        configure_tracing(
            "gateway",
            TelemetrySettings.model_validate({"otlp_endpoint": "http://nowhere", **settings}),
        )
        (self.provider,) = providers
        self.exporter = InMemorySpanExporter()
        self.provider.add_span_processor(SimpleSpanProcessor(self.exporter))
        self.tracer = self.provider.get_tracer("test")

    def only(self) -> ReadableSpan:
        (span,) = self.exporter.get_finished_spans()
        return span


@pytest.fixture
def recorded(monkeypatch: pytest.MonkeyPatch) -> Iterator[Recorded]:
    recorded = Recorded(monkeypatch)
    yield recorded
    recorded.provider.shutdown()


def test_what_is_asked_of_a_service_begins_a_trace(recorded: Recorded) -> None:
    with recorded.tracer.start_as_current_span(
        "answer", kind=SpanKind.SERVER, attributes={"rpc.method": "answer"}
    ):
        recorded.tracer.start_span("ask another", kind=SpanKind.CLIENT).end()
    inner, outer = recorded.exporter.get_finished_spans()
    assert outer.attributes == {"rpc.method": "answer"}
    assert inner.parent is not None
    assert inner.parent.span_id == outer.context.span_id


def test_a_call_for_no_request_begins_none_there_or_here(recorded: Recorded) -> None:
    span = recorded.tracer.start_span("look around", kind=SpanKind.CLIENT)
    span.end()
    assert recorded.exporter.get_finished_spans() == ()
    ((name, value),) = metadata_of(span)
    assert name == "traceparent"
    assert int(value.rpartition("-")[2], 16) & TraceFlags.SAMPLED == 0


def test_a_share_of_the_traces_is_recorded(monkeypatch: pytest.MonkeyPatch) -> None:
    recorded = Recorded(monkeypatch, sample_ratio=0.1)
    for _ in range(2000):
        recorded.tracer.start_span("answer", kind=SpanKind.SERVER).end()
    assert 100 < len(recorded.exporter.get_finished_spans()) < 300
    recorded.provider.shutdown()


@pytest.mark.parametrize(
    ("name", "attributes", "kind"),
    [
        ("stage route", {}, "CHAIN"),
        ("stage screen", {}, "GUARDRAIL"),
        ("meshserve.v1.SafetyService/CheckPrompt", {}, "GUARDRAIL"),
        ("chat demo", {"gen_ai.operation.name": "chat"}, None),
    ],
)
def test_spans_have_a_kind_where_it_is_asked_for(
    monkeypatch: pytest.MonkeyPatch, name: str, attributes: dict[str, str], kind: str | None
) -> None:
    recorded = Recorded(monkeypatch, openinference=True)
    recorded.tracer.start_span(name, kind=SpanKind.SERVER, attributes=attributes).end()
    assert (recorded.only().attributes or {}).get("openinference.span.kind") == kind
    recorded.provider.shutdown()


def test_a_failed_span_tells_the_meaning_of_its_error_and_not_its_message(
    recorded: Recorded,
) -> None:
    span = recorded.tracer.start_span("answer", kind=SpanKind.SERVER)
    mark_failed(
        span,
        ServiceError(
            Reason.PROMPT_TOO_LONG,
            "the prompt 'very private' is too long",
            metadata={"prompt_tokens": "9" * 1000},
            field_violations=[("text", "'very private'")],
        ),
    )
    span.end()
    ended = recorded.only()
    assert ended.status.description == "PROMPT_TOO_LONG"
    assert ended.attributes == {"error.type": "PROMPT_TOO_LONG"}
    (event,) = ended.events
    assert event.name == "exception"
    attributes = dict(event.attributes or {})
    assert attributes["exception.type"] == "PROMPT_TOO_LONG"
    assert attributes["exception.message"]
    assert attributes["meshserve.error.fields"] == ("text",)
    assert attributes["meshserve.error.details"] == (("prompt_tokens=" + "9" * 1000)[:256],)
    assert "private" not in repr(attributes)


@pytest.mark.parametrize(
    ("address", "attributes"),
    [
        ("127.0.0.1:80", {"server.address": "127.0.0.1", "server.port": 80}),
        ("[::1]:80", {"server.address": "::1", "server.port": 80}),
        ("unix:/run/mesh", {"server.address": "/run/mesh"}),
    ],
)
def test_an_address_is_told_in_its_parts(address: str, attributes: dict[str, str | int]) -> None:
    assert server_attributes(address) == attributes
