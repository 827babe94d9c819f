"""The RPCs of the engine: what callers ask, in terms of the core's sequences."""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import AsyncIterator
from contextlib import aclosing

import grpc

from meshserve.v1 import engine_pb2, engine_pb2_grpc, types_pb2
from services.engine.core.messages import ModelFacts
from services.engine.core.settings import BatcherSettings
from services.engine.core_client import CoreClient
from services.engine.encodings import Encodings
from services.engine.generation import Generations, draining_error, unavailable_error
from services.engine.pending_answers import PendingAnswers
from services.engine.request_stream import CoreUnavailableError, RequestStream
from services.engine.shared_stream import SharedStream
from services.engine.validation import default_sampling, missing_capability
from services.runtime.carried_calls import CarriedCalls
from services.runtime.errors import Reason, ServiceError, invalid_field
from services.runtime.telemetry import Metrics

GENERATE_METHOD = "meshserve.v1.EngineService/Generate"
DEFAULT_LOAD_INTERVAL_MS = 1000
LOAD_INTERVAL_RANGE_MS = (10, 60_000)
DEFAULT_DRAIN_TIMEOUT_MS = 30_000
MAX_DRAIN_TIMEOUT_MS = 3_600_000

_GENERATES = [types_pb2.MODEL_CAPABILITY_GENERATE, types_pb2.MODEL_CAPABILITY_CHAT]
_CAPABILITIES = {
    "embed": types_pb2.MODEL_CAPABILITY_EMBED,
    "classify": types_pb2.MODEL_CAPABILITY_CLASSIFY,
    "score": types_pb2.MODEL_CAPABILITY_SCORE,
}

GenerateRequest = engine_pb2.EngineServiceGenerateRequest
GenerateResponse = engine_pb2.EngineServiceGenerateResponse


class EngineServicer(engine_pb2_grpc.EngineServiceServicer):
    """Answers for one engine, which runs one model."""

    def __init__(
        self,
        client: CoreClient,
        metrics: Metrics,
        *,
        model: str,
        aliases: tuple[str, ...],
        draining: asyncio.Event,
        max_inputs: int = BatcherSettings().max_waiting_sequences,
    ) -> None:
        """`max_inputs`: of one request to an encoder."""
        self._client = client
        self._model = model
        self._names = frozenset({"", model, *aliases})
        self._draining = draining
        self._generations = Generations(client, metrics, self._facts, draining, model=model)
        self._encodings = Encodings(
            client, metrics, self._facts, draining, model=model, max_inputs=max_inputs
        )
        self._calls = CarriedCalls(GENERATE_METHOD, metrics)
        self._replica_id = uuid.uuid4().hex

    async def Generate(  # noqa: N802
        self,
        request: GenerateRequest,
        context: grpc.aio.ServicerContext[GenerateRequest, GenerateResponse],
    ) -> AsyncIterator[GenerateResponse]:
        """Tokens as they come: the first at once, then what has accrued at intervals."""
        async with aclosing(self._generations.begin(request).responses()) as responses:
            async for response in responses:
                yield response

    async def GenerateMany(  # noqa: N802
        self,
        request_iterator: AsyncIterator[engine_pb2.GenerateManyRequest],
        context: grpc.aio.ServicerContext[
            engine_pb2.GenerateManyRequest, engine_pb2.GenerateManyResponse
        ],
    ) -> AsyncIterator[engine_pb2.GenerateManyResponse]:
        """The tokens of many requests, on one stream."""
        stream = SharedStream(
            self._generations, self._calls, self._check_ready, self._draining, self._replica_id
        )
        async with aclosing(stream.serve(request_iterator)) as messages:
            async for message in messages:
                yield message

    async def Abort(  # noqa: N802
        self,
        request: engine_pb2.AbortRequest,
        context: grpc.aio.ServicerContext[engine_pb2.AbortRequest, engine_pb2.AbortResponse],
    ) -> engine_pb2.AbortResponse:
        """Ends a request, whose own call then ends with ABORTED, or some of its choices, which
        then end with FINISH_REASON_ABORTED."""
        if not request.request_id:
            raise invalid_field("request_id", "required")
        if (pending := self._encodings.in_flight.get(request.request_id)) is not None:
            pending.abort()
            return engine_pb2.AbortResponse(aborted=True)
        stream = self._generations.in_flight.get(request.request_id)
        if stream is None:
            return engine_pb2.AbortResponse(aborted=False)
        if request.indexes:
            aborted = self._client.withdraw(stream, request.indexes)
            return engine_pb2.AbortResponse(aborted=aborted)
        self._client.abort(stream)
        return engine_pb2.AbortResponse(aborted=True)

    async def GetModelInfo(  # noqa: N802
        self,
        request: engine_pb2.GetModelInfoRequest,
        context: grpc.aio.ServicerContext[
            engine_pb2.GetModelInfoRequest, engine_pb2.GetModelInfoResponse
        ],
    ) -> engine_pb2.GetModelInfoResponse:
        """What the core loaded."""
        facts = self._facts(request.model)
        return engine_pb2.GetModelInfoResponse(
            model=self._model,
            architecture=facts.architecture,
            context_tokens=facts.max_context_tokens,
            vocabulary_size=facts.vocab_size,
            parameters=facts.num_parameters,
            dtype=facts.dtype,
            device=facts.device,
            kv_blocks=facts.num_blocks,
            kv_block_tokens=facts.block_size,
            eos_token_ids=facts.eos_token_ids,
            capabilities=[_CAPABILITIES[task] for task in facts.tasks] or _GENERATES,
            embedding_size=facts.embedding_size,
            labels=facts.labels,
            default_sampling=default_sampling(facts),
            kernels=facts.kernels,
        )

    async def WatchLoad(  # noqa: N802
        self,
        request: engine_pb2.WatchLoadRequest,
        context: grpc.aio.ServicerContext[
            engine_pb2.WatchLoadRequest, engine_pb2.WatchLoadResponse
        ],
    ) -> AsyncIterator[engine_pb2.WatchLoadResponse]:
        """The load now and then at an interval; ends when the engine shuts down."""
        interval_ms = request.interval_ms or DEFAULT_LOAD_INTERVAL_MS
        low, high = LOAD_INTERVAL_RANGE_MS
        if not low <= interval_ms <= high:
            raise invalid_field("interval_ms", f"must lie in [{low}, {high}]")
        while not self._draining.is_set():
            yield self._load()
            try:
                async with asyncio.timeout(interval_ms / 1000):
                    await self._draining.wait()
            except TimeoutError:
                continue
        yield self._load()

    async def Drain(  # noqa: N802
        self,
        request: engine_pb2.DrainRequest,
        context: grpc.aio.ServicerContext[engine_pb2.DrainRequest, engine_pb2.DrainResponse],
    ) -> engine_pb2.DrainResponse:
        """Refuses what is new and waits for what is in flight."""
        timeout_ms = DEFAULT_DRAIN_TIMEOUT_MS
        if request.HasField("timeout_ms"):
            timeout_ms = request.timeout_ms
        if timeout_ms > MAX_DRAIN_TIMEOUT_MS:
            raise invalid_field("timeout_ms", f"at most {MAX_DRAIN_TIMEOUT_MS}")
        in_flight: list[RequestStream | PendingAnswers] = [
            *self._generations.in_flight.values(),
            *self._encodings.in_flight.values(),
        ]
        await self._client.drain(timeout_ms / 1000)
        aborted = sum(stream.was_aborted for stream in in_flight)
        return engine_pb2.DrainResponse(
            finished_requests=len(in_flight) - aborted, aborted_requests=aborted
        )

    async def Embed(  # noqa: N802
        self,
        request: engine_pb2.EngineServiceEmbedRequest,
        context: grpc.aio.ServicerContext[
            engine_pb2.EngineServiceEmbedRequest, engine_pb2.EngineServiceEmbedResponse
        ],
    ) -> engine_pb2.EngineServiceEmbedResponse:
        """The vectors of the inputs."""
        return await self._encodings.embed(request)

    async def Classify(  # noqa: N802
        self,
        request: engine_pb2.EngineServiceClassifyRequest,
        context: grpc.aio.ServicerContext[
            engine_pb2.EngineServiceClassifyRequest, engine_pb2.EngineServiceClassifyResponse
        ],
    ) -> engine_pb2.EngineServiceClassifyResponse:
        """The classes of the inputs."""
        return await self._encodings.classify(request)

    async def Score(  # noqa: N802
        self,
        request: engine_pb2.EngineServiceScoreRequest,
        context: grpc.aio.ServicerContext[
            engine_pb2.EngineServiceScoreRequest, engine_pb2.EngineServiceScoreResponse
        ],
    ) -> engine_pb2.EngineServiceScoreResponse:
        """The scores of the pairs."""
        return await self._encodings.score(request)

    async def LoadAdapter(  # noqa: N802
        self,
        request: engine_pb2.LoadAdapterRequest,
        context: grpc.aio.ServicerContext[
            engine_pb2.LoadAdapterRequest, engine_pb2.LoadAdapterResponse
        ],
    ) -> engine_pb2.LoadAdapterResponse:
        """CAPABILITY_MISSING: the model runs without adapters."""
        raise self._cannot(request.model, "adapters", "this model runs without adapters")

    async def UnloadAdapter(  # noqa: N802
        self,
        request: engine_pb2.UnloadAdapterRequest,
        context: grpc.aio.ServicerContext[
            engine_pb2.UnloadAdapterRequest, engine_pb2.UnloadAdapterResponse
        ],
    ) -> engine_pb2.UnloadAdapterResponse:
        """CAPABILITY_MISSING: the model runs without adapters."""
        raise self._cannot(request.model, "adapters", "this model runs without adapters")

    def _facts(self, model: str) -> ModelFacts:
        self._check_model(model)
        if self._client.facts is None:
            raise unavailable_error("the engine core is starting")
        return self._client.facts

    def _check_ready(self) -> None:
        """A stream outlives what a channel knows of its replica's health; so each of its requests
        asks. Raises ServiceError."""
        try:
            self._client.check_health()
        except CoreUnavailableError as error:
            raise (
                draining_error() if self._client.draining else unavailable_error(str(error))
            ) from None

    def _check_model(self, model: str) -> None:
        if model not in self._names:
            raise ServiceError(
                Reason.MODEL_NOT_FOUND,
                "this engine does not run the model",
                metadata={"served": self._model},
            )

    def _cannot(self, model: str, capability: str, description: str) -> ServiceError:
        self._check_model(model)
        return missing_capability(capability, description)

    def _load(self) -> engine_pb2.WatchLoadResponse:
        load = self._client.load
        return engine_pb2.WatchLoadResponse(
            waiting_sequences=load.waiting_sequences,
            running_sequences=load.running_sequences,
            kv_blocks_used=load.used_blocks,
            kv_blocks_total=load.num_blocks,
            steps=load.steps,
            generated_tokens=load.sampled_tokens,
            prompt_tokens=load.prompt_tokens,
            preemptions=load.preemptions,
            last_step_us=min(load.last_step_us, 2**32 - 1),
            draining=load.draining or self._draining.is_set(),
        )
