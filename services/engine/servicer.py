"""The RPCs of the engine: what callers ask, in terms of the core's sequences."""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import AsyncIterator
from contextlib import aclosing
from pathlib import Path

import grpc

from meshserve.v1 import engine_pb2, types_pb2
from services.engine.adapter_servicer import AdapterServicer
from services.engine.core.settings import BatcherSettings
from services.engine.encodings import Encodings
from services.engine.generation import Generations
from services.engine.hosting import Hosting
from services.engine.lifecycle import seconds_to_drain
from services.engine.shared_stream import SharedStream
from services.engine.validation import default_sampling
from services.engine.waiting import WaitingRequests
from services.runtime.carried_calls import CarriedCalls
from services.runtime.errors import invalid_field
from services.runtime.telemetry import Metrics

GENERATE_METHOD = "meshserve.v1.EngineService/Generate"
DEFAULT_LOAD_INTERVAL_MS = 1000
LOAD_INTERVAL_RANGE_MS = (10, 60_000)

_GENERATES = [types_pb2.MODEL_CAPABILITY_GENERATE, types_pb2.MODEL_CAPABILITY_CHAT]
_CAPABILITIES = {
    "embed": types_pb2.MODEL_CAPABILITY_EMBED,
    "classify": types_pb2.MODEL_CAPABILITY_CLASSIFY,
    "score": types_pb2.MODEL_CAPABILITY_SCORE,
}

GenerateRequest = engine_pb2.EngineServiceGenerateRequest
GenerateResponse = engine_pb2.EngineServiceGenerateResponse


class EngineServicer(AdapterServicer):
    """Answers for one engine and the models that it hosts."""

    def __init__(
        self,
        models: Hosting,
        metrics: Metrics,
        *,
        draining: asyncio.Event,
        max_inputs: int = BatcherSettings().max_waiting_sequences,
        model_cache: Path | None = None,
    ) -> None:
        """`max_inputs`: of one request to an encoder. `model_cache`: where adapters lie that were
        fetched from the hub."""
        super().__init__(models, model_cache)
        self._draining = draining
        self._waiting = WaitingRequests()
        self._generations = Generations(models, metrics, draining, self._waiting)
        self._encodings = Encodings(models, metrics, draining, self._waiting, max_inputs=max_inputs)
        self._calls = CarriedCalls(GENERATE_METHOD, metrics)
        self._replica_id = uuid.uuid4().hex

    async def Generate(  # noqa: N802
        self,
        request: GenerateRequest,
        context: grpc.aio.ServicerContext[GenerateRequest, GenerateResponse],
    ) -> AsyncIterator[GenerateResponse]:
        """Tokens as they come: the first at once, then what has accrued at intervals."""
        await self._generations.wake(request)
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
        stream = SharedStream(self._generations, self._calls, self._draining, self._replica_id)
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
        generation = self._generations.in_flight.get(request.request_id)
        if generation is None:
            # Of one that waits for its model no choice has begun: it is given up as a whole.
            aborted = self._waiting.abort(request.request_id)
            return engine_pb2.AbortResponse(aborted=aborted)
        if request.indexes:
            return engine_pb2.AbortResponse(aborted=generation.withdraw(request.indexes))
        generation.abort()
        return engine_pb2.AbortResponse(aborted=True)

    async def GetModelInfo(  # noqa: N802
        self,
        request: engine_pb2.GetModelInfoRequest,
        context: grpc.aio.ServicerContext[
            engine_pb2.GetModelInfoRequest, engine_pb2.GetModelInfoResponse
        ],
    ) -> engine_pb2.GetModelInfoResponse:
        """What the core loaded."""
        model = self._models.find(request.model)
        facts = model.facts()
        return engine_pb2.GetModelInfoResponse(
            model=model.name,
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
            adapters=sorted(model.client.adapters.names),
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
        in_flight = [each for model in self._models.models for each in model.client.in_flight]
        await self._models.drain(seconds_to_drain(request))
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

    def _load(self) -> engine_pb2.WatchLoadResponse:
        load = self._models.load()
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
