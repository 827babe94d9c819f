"""Requests in the core: how they begin, what is said of them, how they end or fail."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncGenerator, Callable, Sequence

from opentelemetry.context import Context

from meshserve.v1 import engine_pb2
from services.engine.core.errors import (
    ConstraintFailedError,
    ConstraintsUnavailableError,
    InvalidConstraintError,
)
from services.engine.core.messages import (
    Constraint,
    Delta,
    Finish,
    FinishReason,
    ModelFacts,
    SequenceRequest,
)
from services.engine.core_client import CoreClient
from services.engine.hosted_model import HostedModel
from services.engine.hosting import Hosting
from services.engine.refusals import as_service_error, draining_error, unavailable_error
from services.engine.request_stream import (
    CoreLostError,
    CoreUnavailableError,
    RefusedError,
    RequestStream,
)
from services.engine.responses import ResponseBuilder
from services.engine.step_spans import SequenceSpans
from services.engine.validation import missing_capability, sequence_requests
from services.engine.waiting import WaitingRequests
from services.runtime.errors import Reason, ServiceError, invalid_field
from services.runtime.telemetry import Metrics

log = logging.getLogger(__name__)


class Generations:
    """Begins requests, and knows those in flight by their ids."""

    def __init__(
        self,
        models: Hosting,
        metrics: Metrics,
        draining: asyncio.Event,
        waiting: WaitingRequests,
    ) -> None:
        self.in_flight: dict[str, Generation] = {}
        self._models = models
        self._draining = draining
        self._waiting = waiting
        self._queue_duration = metrics.histogram("meshserve_engine_queue_duration_seconds")
        self._prompt_length = metrics.histogram("meshserve_engine_prompt_length_tokens")

    def model_of(self, request: engine_pb2.EngineServiceGenerateRequest) -> HostedModel:
        """The model that a request is for. Raises ServiceError."""
        return self._models.find_able(request.model, _generates)

    async def wake(self, request: engine_pb2.EngineServiceGenerateRequest) -> None:
        """Waits until the model of a request can take it, if it is asleep. Raises ServiceError."""
        model = self.model_of(request)
        if not model.is_asleep:
            return
        if self._draining.is_set():
            raise draining_error()
        if model.client.facts is not None:
            _check_generates(model.client.facts)
        await self._waiting.wait(request.request_id, model)

    def begin(
        self,
        request: engine_pb2.EngineServiceGenerateRequest,
        context: Context | None = None,
    ) -> Generation:
        """Hands a request to the core of its model, which must not be asleep. Its spans are made in
        `context`, or the current one.

        Raises:
            ServiceError: it is not valid, or cannot be taken now.
        """
        model = self.model_of(request)
        if self._draining.is_set():
            raise draining_error()
        model.check_ready()
        facts, client = model.facts(), model.client
        _check_generates(facts)
        if request.request_id in self.in_flight:
            raise ServiceError(Reason.REQUEST_ID_IN_USE, "a request with this id is in flight")
        sequences = sequence_requests(
            request, facts, client.next_sequence_id, client.adapters.names
        )
        self._prompt_length.labels(model.name).observe(len(request.prompt.ids))
        try:
            stream = client.submit(sequences)
        except CoreUnavailableError as error:
            raise unavailable_error(str(error)) from None
        spans = SequenceSpans(
            stream.sequence_ids,
            len(request.prompt.ids),
            self._queue_duration.labels(model.name),
            context,
        )
        generation = Generation(client, stream, sequences, spans, self.in_flight.pop)
        self.in_flight[request.request_id] = generation
        return generation


def _generates(facts: ModelFacts) -> bool:
    return not facts.tasks


def _check_generates(facts: ModelFacts) -> None:
    if not _generates(facts):
        raise missing_capability("generate", "this model generates nothing")


class Generation:
    """One request in the core. `end` must be called, and aborts there what has not ended."""

    def __init__(
        self,
        client: CoreClient,
        stream: RequestStream,
        sequences: list[SequenceRequest],
        spans: SequenceSpans,
        forget: Callable[[str], object],
    ) -> None:
        self.stream = stream
        self._client = client
        self._request_id = sequences[0].request_id
        choices = {sequence.sequence_id: sequence.choice_index for sequence in sequences}
        self._constraint = sequences[0].constraint
        self._builder = ResponseBuilder(choices, sequences[0].prompt_token_ids)
        self._spans = spans
        self._forget = forget

    async def responses(self) -> AsyncGenerator[engine_pb2.EngineServiceGenerateResponse]:
        """The messages of the request as they become due. Raises ServiceError, and ends it."""
        failure: ServiceError | None = None
        try:
            while deltas := await self._read():
                chunk = engine_pb2.TokenChunk()
                self._builder.add_tokens(chunk, deltas)
                if chunk.deltas:
                    yield engine_pb2.EngineServiceGenerateResponse(chunk=chunk)
                for complete in self._builder.completes(deltas, self.stream.withdrawn):
                    yield engine_pb2.EngineServiceGenerateResponse(complete=complete)
                self._follow(deltas)
        except ServiceError as error:
            failure = error
            raise
        finally:
            # However it ends: the caller gone, the deadline passed.
            self.end(failure or ServiceError(Reason.CANCELLED, "the caller went away"))

    def collect(self, output: engine_pb2.GenerationOutput) -> None:
        """Adds to `output` what has accrued, and whether it was the last.

        Raises:
            ServiceError: the request has failed; what came before stands in `output`.
        """
        deltas = self.stream.take()
        if deltas:
            self._builder.add_tokens(output.chunk, deltas)
            output.completes.extend(self._builder.completes(deltas, self.stream.withdrawn))
            self._follow(deltas)
        try:
            self.stream.raise_failure()
        except (CoreLostError, RefusedError) as error:
            raise as_service_error(error) from None
        output.finished = self.stream.is_over

    def withdraw(self, choices: Sequence[int]) -> bool:
        """Ends some choices, while the others go on. Returns whether there was any to end."""
        return self._client.withdraw(self.stream, choices)

    def abort(self) -> None:
        """Ends the request, which fails with ABORTED."""
        self._client.abort(self.stream)

    def end(self, error: ServiceError | None) -> None:
        """Aborts what has not ended, and records why it did not; does nothing the second time."""
        self._spans.end(error or ServiceError(Reason.CANCELLED, "the caller gave it up"))
        self.stream.close()
        if self._request_id:
            self._forget(self._request_id)
            self._request_id = ""

    async def _read(self) -> list[Delta]:
        try:
            return await self.stream.read()
        except (CoreLostError, RefusedError) as error:
            raise as_service_error(error) from None

    def _follow(self, deltas: list[Delta]) -> None:
        for delta in deltas:
            self._spans.follow(delta)
            if delta.finish is not None:
                self._raise_if_failed(delta)

    def _raise_if_failed(self, delta: Delta) -> None:
        finish = delta.finish
        assert finish is not None
        if finish.reason is FinishReason.ABORTED and delta.sequence_id not in self.stream.withdrawn:
            if self._client.draining:
                raise draining_error()
            raise ServiceError(Reason.ABORTED, "the request was aborted by another call")
        if finish.reason is FinishReason.ERROR:
            if self._constraint is not None:
                _raise_if_of_constraint(finish, self._constraint)
            log.error("a sequence failed alone: %s: %s", finish.error_kind, finish.error)
            raise ServiceError(
                Reason.SEQUENCE_FAILED,
                "the model's computation failed for this request",
                metadata={"error": finish.error_kind},
            )


def _raise_if_of_constraint(finish: Finish, constraint: Constraint) -> None:
    match finish.error_kind:
        case InvalidConstraintError.__name__ | ConstraintFailedError.__name__:
            raise invalid_field(f"constraint.{constraint.kind}", finish.error)
        case ConstraintsUnavailableError.__name__:
            raise missing_capability("constraints", finish.error)
