"""Requests to an encoder, as its front sees them: spans of where their time went, and failures."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Callable

import pytest
from opentelemetry import trace
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import StatusCode

from meshserve.v1 import engine_pb2
from services.engine import encodings
from services.engine.core.messages import Answer, EncodeRequest, ModelFacts
from services.engine.encodings import Encodings
from services.engine.hosted_model import HostedModel, State
from services.engine.hosting import Hosting
from services.engine.pending_answers import PendingAnswers
from services.engine.request_stream import CoreLostError
from services.engine.waiting import WaitingRequests
from services.runtime.errors import Reason, ServiceError
from services.runtime.telemetry import Metrics

SECOND = 1_000_000_000
FACTS = ModelFacts(
    architecture="BertModel",
    num_layers=1,
    num_parameters=1,
    vocab_size=10,
    max_context_tokens=8,
    eos_token_ids=(),
    dtype="float32",
    device="cpu",
    block_size=0,
    num_blocks=0,
    kv_cache_memory_bytes=0,
    load_time_s=0.0,
    tasks=("embed",),
    embedding_size=2,
)


class Client:
    """Stands for the core client: answers as a test says."""

    draining = False
    facts = FACTS

    def __init__(self, answer: Callable[[PendingAnswers, list[EncodeRequest]], None]) -> None:
        self._answer = answer
        self._ids = itertools.count()
        self.aborted: list[int] = []

    def check_health(self) -> None:
        pass

    def next_sequence_id(self) -> int:
        return next(self._ids)

    def encode(self, requests: list[EncodeRequest]) -> PendingAnswers:
        pending = PendingAnswers([request.sequence_id for request in requests], self._forget)
        asyncio.get_running_loop().call_soon(self._answer, pending, requests)
        return pending

    def _forget(self, sequence_ids: list[int], *, abort: bool) -> None:
        if abort:
            self.aborted += sequence_ids


@pytest.fixture
def exporter(monkeypatch: pytest.MonkeyPatch) -> InMemorySpanExporter:
    """Keeps the spans that a test makes."""
    exporter = InMemorySpanExporter()
    provider = TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    monkeypatch.setattr(encodings, "get_tracer", lambda: provider.get_tracer("test"))
    return exporter


async def embed(client: Client, num_inputs: int = 1) -> engine_pb2.EngineServiceEmbedResponse:
    """A request that is traced."""
    model = HostedModel("m", client, state=State.READY)  # type: ignore[arg-type]
    served = Encodings(
        Hosting([model]), Metrics("engine"), asyncio.Event(), WaitingRequests(), max_inputs=10
    )
    request = engine_pb2.EngineServiceEmbedRequest(
        request_id="r", inputs=[engine_pb2.EncoderInput(token_ids=[1, 2, 3])] * num_inputs
    )
    with trace.use_span(TracerProvider().get_tracer("test").start_span("request")):
        try:
            return await served.embed(request)
        finally:
            assert served.in_flight == {}


def spans_of(exporter: InMemorySpanExporter) -> dict[str, ReadableSpan]:
    return {span.name: span for span in exporter.get_finished_spans()}


async def test_a_request_leaves_queue_and_encode(exporter: InMemorySpanExporter) -> None:
    def in_two_batches(pending: PendingAnswers, requests: list[EncodeRequest]) -> None:
        values = b"\x00\x00\x80\x3f\x00\x00\x00\xc0"
        for request, started_s in zip(requests, (2, 4, 4), strict=True):
            answer = Answer(request.sequence_id, values, SECOND, started_s * SECOND)
            pending.accrue(answer, ended_ns=(started_s + 1) * SECOND)

    response = await embed(Client(in_two_batches), num_inputs=3)
    assert [list(each.values) for each in response.embeddings] == [[1.0, -2.0]] * 3
    spans = spans_of(exporter)
    assert (spans["queue"].start_time, spans["queue"].end_time) == (SECOND, 2 * SECOND)
    assert (spans["encode"].start_time, spans["encode"].end_time) == (2 * SECOND, 5 * SECOND)
    assert dict(spans["encode"].attributes or {}) == {
        "meshserve.engine.inputs": 3,
        "meshserve.engine.prompt_tokens": 9,
        "meshserve.engine.steps": 2,
    }


async def test_a_core_that_is_lost_fails_the_queue_span(exporter: InMemorySpanExporter) -> None:
    def lose(pending: PendingAnswers, requests: list[EncodeRequest]) -> None:
        pending.fail(CoreLostError("gone"))

    with pytest.raises(ServiceError) as raised:
        await embed(Client(lose))
    assert raised.value.reason is Reason.ENGINE_RESTARTED
    spans = spans_of(exporter)
    assert set(spans) == {"queue"}
    assert spans["queue"].status.status_code is StatusCode.ERROR


async def test_a_caller_that_goes_away_is_an_event_and_frees_the_core(
    exporter: InMemorySpanExporter,
) -> None:
    client = Client(lambda pending, requests: None)
    call = asyncio.ensure_future(embed(client, num_inputs=2))
    await asyncio.sleep(0.01)
    call.cancel()
    with pytest.raises(asyncio.CancelledError):
        await call
    assert client.aborted == [0, 1]
    (span,) = exporter.get_finished_spans()
    assert [event.name for event in span.events] == ["cancelled"]
    assert span.status.status_code is StatusCode.UNSET


async def test_the_first_failure_ends_a_request_and_the_rest_of_it(
    exporter: InMemorySpanExporter,
) -> None:
    def fail_one(pending: PendingAnswers, requests: list[EncodeRequest]) -> None:
        bad = Answer(requests[1].sequence_id, error="broken", error_kind="NotFiniteError")
        pending.accrue(bad, ended_ns=SECOND)

    client = Client(fail_one)
    with pytest.raises(ServiceError) as raised:
        await embed(client, num_inputs=3)
    assert raised.value.reason is Reason.SEQUENCE_FAILED
    assert raised.value.metadata == {"error": "NotFiniteError", "input": "1"}
    assert client.aborted == [0, 2]
