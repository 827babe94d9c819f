"""Spans that tell where a request's time went, made from the core's timing facts."""

from __future__ import annotations

import pytest
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from prometheus_client import CollectorRegistry, Histogram

from services.engine import step_spans
from services.engine.core.messages import Delta, Finish, FinishReason, Timing
from services.engine.step_spans import SequenceSpans

SECOND = 1_000_000_000


@pytest.fixture
def exporter(monkeypatch: pytest.MonkeyPatch) -> InMemorySpanExporter:
    """Keeps the spans that a test makes."""
    exporter = InMemorySpanExporter()
    provider = TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    monkeypatch.setattr(step_spans, "get_tracer", lambda: provider.get_tracer("test"))
    return exporter


def spans_of(exporter: InMemorySpanExporter) -> dict[str, ReadableSpan]:
    return {span.name: span for span in exporter.get_finished_spans()}


def make_spans() -> SequenceSpans:
    return SequenceSpans(7, Histogram("queue", "Queue.", registry=CollectorRegistry()))


def test_a_finished_sequence_leaves_queue_prefill_and_decode(
    exporter: InMemorySpanExporter,
) -> None:
    spans = make_spans()
    first = Timing(SECOND, SECOND, 2 * SECOND, 3 * SECOND)
    last = Timing(SECOND, SECOND, 2 * SECOND, 3 * SECOND, 5 * SECOND, preemptions=1)
    spans.follow(Delta(0, [1], timing=first))
    spans.follow(Delta(0, [2, 3]))
    spans.follow(Delta(0, [4], timing=last, finish=Finish(FinishReason.LENGTH)))
    spans.end("CANCELLED")
    found = spans_of(exporter)
    times = {name: (span.start_time, span.end_time) for name, span in found.items()}
    assert times == {
        "queue": (SECOND, 2 * SECOND),
        "prefill": (2 * SECOND, 3 * SECOND),
        "decode": (3 * SECOND, 5 * SECOND),
    }
    assert found["queue"].attributes == {"meshserve.engine.preemptions": 1}
    assert found["prefill"].attributes == {"gen_ai.usage.input_tokens": 7}
    assert found["decode"].attributes == {"gen_ai.usage.output_tokens": 4}
    assert all(span.status.is_unset for span in found.values())


def test_a_sequence_cut_off_marks_the_phase_it_was_in(exporter: InMemorySpanExporter) -> None:
    spans = make_spans()
    spans.follow(Delta(0, [1], timing=Timing(SECOND, SECOND, 2 * SECOND, 3 * SECOND)))
    spans.end("CANCELLED")
    found = spans_of(exporter)
    assert set(found) == {"queue", "prefill", "decode"}
    assert found["decode"].attributes is not None
    assert found["decode"].attributes["error.type"] == "CANCELLED"
    assert found["prefill"].status.is_unset


def test_a_sequence_that_failed_before_its_first_token_has_no_decode(
    exporter: InMemorySpanExporter,
) -> None:
    spans = make_spans()
    timing = Timing(SECOND, SECOND, 2 * SECOND, 0, 3 * SECOND)
    finish = Finish(FinishReason.ERROR, error="x", error_kind="LogitsError")
    spans.follow(Delta(0, [], timing=timing, finish=finish))
    spans.end("SEQUENCE_FAILED")
    found = spans_of(exporter)
    assert set(found) == {"queue", "prefill"}
    assert found["prefill"].attributes is not None
    assert found["prefill"].attributes["error.type"] == "SEQUENCE_FAILED"
