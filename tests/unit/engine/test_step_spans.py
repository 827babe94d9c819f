"""Spans that tell where a request's time went, made from the core's timing facts."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

import pytest
from opentelemetry import trace
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import StatusCode
from prometheus_client import CollectorRegistry, Histogram

from services.engine import step_spans
from services.engine.core.messages import Delta, Finish, FinishReason, Timing
from services.engine.step_spans import SequenceSpans
from services.runtime.errors import Reason, ServiceError

SECOND = 1_000_000_000
FIRST = Timing(SECOND, SECOND, 2 * SECOND, 3 * SECOND, steps=2)
CANCELLED = ServiceError(Reason.CANCELLED, "gone")


@pytest.fixture
def exporter(monkeypatch: pytest.MonkeyPatch) -> InMemorySpanExporter:
    """Keeps the spans that a test makes."""
    exporter = InMemorySpanExporter()
    provider = TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    monkeypatch.setattr(step_spans, "get_tracer", lambda: provider.get_tracer("test"))
    return exporter


def make_spans(sequence_ids: tuple[int, ...] = (0,)) -> SequenceSpans:
    """Spans of a request that is traced."""
    queue = Histogram("queue", "Queue.", registry=CollectorRegistry())
    request = TracerProvider().get_tracer("test").start_span("request")
    return SequenceSpans(sequence_ids, 7, queue, trace.set_span_in_context(request))


def spans_of(exporter: InMemorySpanExporter) -> dict[str, ReadableSpan]:
    return {span.name: span for span in exporter.get_finished_spans()}


def events_of(span: ReadableSpan) -> list[tuple[str, int | None, Mapping[str, Any]]]:
    return [(event.name, event.timestamp, event.attributes or {}) for event in span.events]


def end_of(timing: Timing, reason: FinishReason = FinishReason.LENGTH) -> Delta:
    return Delta(0, [4], timing=timing, finish=Finish(reason))


def test_a_finished_sequence_leaves_queue_prefill_and_decode(
    exporter: InMemorySpanExporter,
) -> None:
    spans = make_spans()
    last = Timing(
        SECOND, SECOND, 2 * SECOND, 3 * SECOND, 5 * SECOND, steps=5, cached_prompt_tokens=4
    )
    spans.follow(Delta(0, [1], timing=FIRST))
    spans.follow(Delta(0, [2, 3]))
    spans.follow(end_of(last))
    spans.end(CANCELLED)
    found = spans_of(exporter)
    times = {name: (span.start_time, span.end_time) for name, span in found.items()}
    assert times == {
        "queue": (SECOND, 2 * SECOND),
        "prefill": (2 * SECOND, 3 * SECOND),
        "decode": (3 * SECOND, 5 * SECOND),
    }
    assert found["queue"].attributes == {"meshserve.choice": 0}
    assert found["prefill"].attributes == {
        "meshserve.choice": 0,
        "meshserve.engine.prompt_tokens": 7,
        "meshserve.engine.cached_prompt_tokens": 4,
        "meshserve.engine.steps": 2,
    }
    assert found["decode"].attributes == {
        "meshserve.choice": 0,
        "meshserve.engine.completion_tokens": 4,
        "meshserve.engine.steps": 3,
        "meshserve.engine.preemptions": 0,
    }
    assert events_of(found["decode"]) == [("first_token", 3 * SECOND, {})]
    assert all(span.status.is_unset for span in found.values())


def test_interruptions_stand_in_the_phase_that_they_fell_in(
    exporter: InMemorySpanExporter,
) -> None:
    spans = make_spans()
    interruptions = [2_200_000_000, 2_400_000_000, 4_000_000_000, 4_500_000_000]
    last = Timing(
        SECOND,
        SECOND,
        2 * SECOND,
        3 * SECOND,
        5 * SECOND,
        preemptions=2,
        interruptions_ns=interruptions,
    )
    spans.follow(Delta(0, [1], timing=FIRST))
    spans.follow(end_of(last))
    found = spans_of(exporter)
    assert events_of(found["prefill"]) == [
        ("preempted", interruptions[0], {}),
        ("resumed", interruptions[1], {}),
    ]
    assert [event for event in events_of(found["decode"]) if event[0] != "first_token"] == [
        ("preempted", interruptions[2], {}),
        ("resumed", interruptions[3], {}),
    ]


def test_a_decode_sums_up_its_speculation_at_its_end(exporter: InMemorySpanExporter) -> None:
    spans = make_spans()
    last = Timing(
        SECOND,
        SECOND,
        2 * SECOND,
        3 * SECOND,
        5 * SECOND,
        drafted_tokens=8,
        accepted_draft_tokens=6,
    )
    spans.follow(Delta(0, [1], timing=FIRST))
    spans.follow(end_of(last))
    assert events_of(spans_of(exporter)["decode"])[-1] == (
        "speculation",
        5 * SECOND,
        {"meshserve.engine.drafted_tokens": 8, "meshserve.engine.accepted_draft_tokens": 6},
    )


def test_progress_is_told_ever_more_seldom(exporter: InMemorySpanExporter) -> None:
    spans = make_spans()
    now_ns = time.time_ns()
    first = Timing(now_ns, now_ns, now_ns, now_ns)
    spans.follow(Delta(0, [1], timing=first))
    for _ in range(9_999):
        spans.follow(Delta(0, [1]))
    finished_ns = time.time_ns()
    spans.follow(end_of(Timing(now_ns, now_ns, now_ns, now_ns, finished_ns)))
    told = [event for event in events_of(spans_of(exporter)["decode"]) if event[0] == "progress"]
    tokens = [attributes["meshserve.engine.completion_tokens"] for _, _, attributes in told]
    assert tokens == [16, 64, 256, 1024, 4096]
    times = [at_ns for _, at_ns, _ in told if at_ns is not None]
    assert now_ns < times[0] < times[-1] <= finished_ns
    assert all(attributes["meshserve.engine.tokens_per_s"] > 0 for _, _, attributes in told)


def test_a_failure_marks_the_phase_it_fell_in(exporter: InMemorySpanExporter) -> None:
    spans = make_spans()
    spans.follow(Delta(0, [1], timing=FIRST))
    spans.end(ServiceError(Reason.DEADLINE_EXCEEDED, "too late"))
    found = spans_of(exporter)
    assert set(found) == {"queue", "prefill", "decode"}
    assert found["decode"].status.status_code is StatusCode.ERROR
    assert found["decode"].attributes is not None
    assert found["decode"].attributes["error.type"] == "DEADLINE_EXCEEDED"
    assert found["prefill"].status.is_unset


def test_a_sequence_that_was_given_up_says_so_and_has_not_failed(
    exporter: InMemorySpanExporter,
) -> None:
    spans = make_spans()
    spans.follow(Delta(0, [1], timing=FIRST))
    spans.end(CANCELLED)
    decode = spans_of(exporter)["decode"]
    assert decode.status.is_unset
    assert events_of(decode)[-1] == ("cancelled", decode.end_time, {})


def test_a_sequence_that_failed_before_its_first_token_has_no_decode(
    exporter: InMemorySpanExporter,
) -> None:
    spans = make_spans()
    timing = Timing(SECOND, SECOND, 2 * SECOND, 0, 3 * SECOND)
    finish = Finish(FinishReason.ERROR, error="x", error_kind="LogitsError")
    spans.follow(Delta(0, [], timing=timing, finish=finish))
    spans.end(ServiceError(Reason.SEQUENCE_FAILED, "x"))
    found = spans_of(exporter)
    assert set(found) == {"queue", "prefill"}
    assert found["prefill"].end_time == 3 * SECOND
    assert found["prefill"].attributes is not None
    assert found["prefill"].attributes["error.type"] == "SEQUENCE_FAILED"


def test_a_request_given_up_while_it_waits_leaves_its_wait(
    exporter: InMemorySpanExporter,
) -> None:
    before_ns = time.time_ns()
    make_spans().end(CANCELLED)
    (queue,) = exporter.get_finished_spans()
    assert queue.name == "queue"
    assert [event[0] for event in events_of(queue)] == ["cancelled"]
    assert queue.start_time is not None
    assert queue.end_time is not None
    assert before_ns <= queue.start_time <= queue.end_time <= time.time_ns()


def test_each_choice_of_a_request_has_spans_of_its_own(exporter: InMemorySpanExporter) -> None:
    spans = make_spans((5, 9))
    for sequence_id in (9, 5):
        spans.follow(Delta(sequence_id, [1], timing=FIRST))
    spans.end(CANCELLED)
    choices = [
        span.attributes["meshserve.choice"]
        for span in exporter.get_finished_spans()
        if span.name == "decode" and span.attributes is not None
    ]
    assert sorted(choices) == [0, 1]


def test_a_request_that_is_not_traced_leaves_its_wait_in_the_metrics_alone(
    exporter: InMemorySpanExporter,
) -> None:
    registry = CollectorRegistry()
    spans = SequenceSpans((0,), 7, Histogram("queue", "Queue.", registry=registry))
    spans.follow(Delta(0, [1], timing=FIRST))
    spans.follow(Delta(0, [2]))
    spans.follow(end_of(Timing(SECOND, SECOND, 2 * SECOND, 3 * SECOND, 5 * SECOND)))
    spans.end(CANCELLED)
    assert exporter.get_finished_spans() == ()
    assert registry.get_sample_value("queue_count") == 1
    assert registry.get_sample_value("queue_sum") == 1
