"""Requests to an encoder: how they begin, and what becomes of their answers."""

from __future__ import annotations

import asyncio
import logging
import struct
from collections.abc import Sequence
from typing import Literal, TypeAlias

from opentelemetry import trace

from meshserve.v1 import engine_pb2, types_pb2
from services.engine.core.messages import EncodeTask, ModelFacts
from services.engine.encode_validation import check_task, embed_task, encode_requests
from services.engine.hosted_model import HostedModel
from services.engine.hosting import Hosting
from services.engine.pending_answers import (
    AbortedError,
    Answers,
    PendingAnswers,
    SequenceFailedError,
)
from services.engine.refusals import as_service_error, draining_error, unavailable_error
from services.engine.request_stream import CoreLostError, CoreUnavailableError, RefusedError
from services.engine.waiting import WaitingRequests
from services.runtime.errors import Reason, ServiceError
from services.runtime.telemetry import Metrics, get_tracer
from services.runtime.telemetry.tracing import mark_failed

log = logging.getLogger(__name__)

EncodeCall: TypeAlias = (
    engine_pb2.EngineServiceEmbedRequest
    | engine_pb2.EngineServiceClassifyRequest
    | engine_pb2.EngineServiceScoreRequest
)


class Encodings:
    """Answers requests to an encoder, and knows those in flight by their ids."""

    def __init__(
        self,
        models: Hosting,
        metrics: Metrics,
        draining: asyncio.Event,
        waiting: WaitingRequests,
        *,
        max_inputs: int,
    ) -> None:
        """`max_inputs`: of one request."""
        self.in_flight: dict[str, PendingAnswers] = {}
        self._models = models
        self._draining = draining
        self._waiting = waiting
        self._max_inputs = max_inputs
        self._inputs = metrics.counter("meshserve_engine_encoded_inputs")
        self._queue_duration = metrics.histogram("meshserve_engine_queue_duration_seconds")
        self._prompt_length = metrics.histogram("meshserve_engine_prompt_length_tokens")

    async def embed(
        self, request: engine_pb2.EngineServiceEmbedRequest
    ) -> engine_pb2.EngineServiceEmbedResponse:
        """The vectors of the inputs. Raises ServiceError."""
        model, facts = await self._awake(request, "embed")
        task = embed_task(request, facts)
        values = await self._answer(request.request_id, request.inputs, task, model)
        return engine_pb2.EngineServiceEmbedResponse(embeddings=map(_embedding, values))

    async def classify(
        self, request: engine_pb2.EngineServiceClassifyRequest
    ) -> engine_pb2.EngineServiceClassifyResponse:
        """The classes of the inputs. Raises ServiceError."""
        model, facts = await self._awake(request, "classify")
        task = check_task("classify", facts)
        values = await self._answer(request.request_id, request.inputs, task, model)
        return engine_pb2.EngineServiceClassifyResponse(
            classifications=[_classification(each, facts.labels) for each in values]
        )

    async def score(
        self, request: engine_pb2.EngineServiceScoreRequest
    ) -> engine_pb2.EngineServiceScoreResponse:
        """The scores of the pairs. Raises ServiceError."""
        model, facts = await self._awake(request, "score")
        task = check_task("score", facts)
        values = await self._answer(request.request_id, request.inputs, task, model)
        return engine_pb2.EngineServiceScoreResponse(scores=_floats(b"".join(values)))

    async def _awake(
        self, request: EncodeCall, kind: Literal["embed", "classify", "score"]
    ) -> tuple[HostedModel, ModelFacts]:
        """The model that a request is for, once it can take it. Raises ServiceError."""
        model = self._models.find_able(request.model, lambda facts: kind in facts.tasks)
        if self._draining.is_set():
            raise draining_error()
        if model.is_asleep:
            if model.client.facts is not None:
                check_task(kind, model.client.facts)
            await self._waiting.wait(request.request_id, model)
        model.check_ready()
        return model, model.facts()

    async def _answer(
        self,
        request_id: str,
        inputs: Sequence[engine_pb2.EncoderInput],
        task: EncodeTask,
        model: HostedModel,
    ) -> list[bytes]:
        """The values of each input. A caller that goes away takes its inputs from the queue."""
        if request_id in self.in_flight:
            raise ServiceError(Reason.REQUEST_ID_IN_USE, "a request with this id is in flight")
        sequences = encode_requests(
            request_id,
            inputs,
            task,
            model.facts(),
            model.client.next_sequence_id,
            max_inputs=self._max_inputs,
        )
        for sequence in sequences:
            self._prompt_length.labels(model.name).observe(len(sequence.token_ids))
        try:
            pending = model.client.encode(sequences)
        except CoreUnavailableError as error:
            raise unavailable_error(str(error)) from None
        self.in_flight[request_id] = pending
        num_tokens = sum(len(sequence.token_ids) for sequence in sequences)
        try:
            with pending:
                answered = await self._wait(pending, model)
        except ServiceError as error:
            _record_failure(pending.submitted_ns, error)
            raise
        except asyncio.CancelledError:
            gone = ServiceError(Reason.CANCELLED, "the caller went away")
            _record_failure(pending.submitted_ns, gone)
            raise
        finally:
            del self.in_flight[request_id]
        self._inputs.labels(model.name, task.kind).inc(len(sequences))
        self._observe(answered, num_tokens, model.name)
        return [answer.values for answer in answered.answers]

    async def _wait(self, pending: PendingAnswers, model: HostedModel) -> Answers:
        try:
            return await pending.wait()
        except (CoreLostError, RefusedError) as error:
            raise as_service_error(error) from None
        except AbortedError as error:
            if model.client.draining:
                raise draining_error() from None
            raise ServiceError(Reason.ABORTED, str(error)) from None
        except SequenceFailedError as error:
            log.error("a sequence failed alone: %s: %s", error.kind, error)
            raise ServiceError(
                Reason.SEQUENCE_FAILED,
                "the model's computation failed for one input of this request",
                metadata={"error": error.kind, "input": str(error.index)},
            ) from None

    def _observe(self, answered: Answers, num_tokens: int, model: str) -> None:
        """Record how long the inputs waited, and the spans of the request."""
        answers = answered.answers
        queue_duration = self._queue_duration.labels(model)
        for answer in answers:
            queue_duration.observe((answer.started_ns - answer.queued_ns) / 1e9)
        if not trace.get_current_span().is_recording():
            return
        starts = {answer.started_ns for answer in answers}
        tracer = get_tracer()
        queued = tracer.start_span("queue", start_time=answers[0].queued_ns)
        queued.end(min(starts))
        attributes = {
            "meshserve.engine.inputs": len(answers),
            "meshserve.engine.prompt_tokens": num_tokens,
            "meshserve.engine.steps": len(starts),
        }
        encoded = tracer.start_span("encode", start_time=min(starts), attributes=attributes)
        encoded.end(answered.ended_ns)


def _record_failure(submitted_ns: int, error: ServiceError) -> None:
    """A request that was not answered has the span `queue` alone."""
    span = get_tracer().start_span("queue", start_time=submitted_ns)
    if error.reason is Reason.CANCELLED:
        span.add_event("cancelled")
    else:
        mark_failed(span, error)
    span.end()


def _embedding(values: bytes) -> types_pb2.Embedding:
    # Packed floats are these very bytes on the wire: nothing has to look at each of them.
    return types_pb2.Embedding.FromString(b"\x0a" + _varint(len(values)) + values)


def _varint(number: int) -> bytes:
    encoded = bytearray()
    while number > 0x7F:
        encoded.append(number & 0x7F | 0x80)
        number >>= 7
    encoded.append(number)
    return bytes(encoded)


def _classification(values: bytes, labels: Sequence[str]) -> types_pb2.Classification:
    likeliest_first = sorted(
        zip(labels, _floats(values), strict=True), key=lambda scored: scored[1], reverse=True
    )
    return types_pb2.Classification(
        scores=[types_pb2.ClassScore(label=label, score=score) for label, score in likeliest_first]
    )


def _floats(values: bytes) -> tuple[float, ...]:
    return struct.unpack(f"<{len(values) // 4}f", values)
