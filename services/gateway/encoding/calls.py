"""Requests to encoders from their arrival to their answers."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from meshserve.v1 import gateway_pb2
from services.gateway.encoding.context import (
    CLASSIFY,
    EMBED,
    SCORE,
    EncodingContext,
    EncodingRequest,
    Task,
)
from services.gateway.encoding.look_up import LookUpVectors
from services.gateway.inference import Attributes, Inference, new_request_id, text_metadata
from services.gateway.pipeline import Pipeline
from services.gateway.usage import total_usage

CallMetadata = Iterable[tuple[str, Any]]


class Encodings:
    """Answers requests for embeddings, classes and scores. All methods raise ServiceError."""

    def __init__(
        self, inference: Inference, pipeline: Pipeline[EncodingContext], look_up: LookUpVectors
    ) -> None:
        """`look_up` is among the stages of the pipeline, and goes on when an answer is out."""
        self._inference = inference
        self._pipeline = pipeline
        self._look_up = look_up

    async def embed(
        self, request: gateway_pb2.EmbedRequest, metadata: CallMetadata
    ) -> gateway_pb2.EmbedResponse:
        """The vectors of texts."""
        context = await self._answer(EMBED, request, request.texts, metadata)
        return gateway_pb2.EmbedResponse(
            request_id=context.request_id,
            model=context.served.name,
            embeddings=context.answers,
            usage=total_usage(context),
            cached_embeddings=len(context.texts) - len(context.uncached),
            prompt_safety=context.prompt_safety,
        )

    async def classify(
        self, request: gateway_pb2.ClassifyRequest, metadata: CallMetadata
    ) -> gateway_pb2.ClassifyResponse:
        """The classes of texts."""
        context = await self._answer(CLASSIFY, request, request.texts, metadata)
        if request.top_k:
            for classification in context.answers:
                del classification.scores[request.top_k :]
        return gateway_pb2.ClassifyResponse(
            request_id=context.request_id,
            model=context.served.name,
            classifications=context.answers,
            usage=total_usage(context),
            prompt_safety=context.prompt_safety,
        )

    async def score(
        self, request: gateway_pb2.ScoreRequest, metadata: CallMetadata
    ) -> gateway_pb2.ScoreResponse:
        """The scores of documents against a query."""
        context = await self._answer(SCORE, request, request.documents, metadata, request.query)
        return gateway_pb2.ScoreResponse(
            request_id=context.request_id,
            model=context.served.name,
            scores=context.answers,
            usage=total_usage(context),
            prompt_safety=context.prompt_safety,
        )

    async def drain(self) -> None:
        """Waits for what outlives its calls."""
        await self._pipeline.drain()
        await self._look_up.drain()

    async def _answer(
        self,
        task: Task,
        request: EncodingRequest,
        texts: Iterable[str],
        metadata: CallMetadata,
        query: str = "",
    ) -> EncodingContext:
        request_id = request.request_id or new_request_id()
        attributes: Attributes = {}
        if isinstance(request, gateway_pb2.EmbedRequest) and request.HasField("dimensions"):
            attributes["gen_ai.embeddings.dimension.count"] = request.dimensions
        context = EncodingContext(
            task=task,
            request=request,
            texts=list(texts),
            query=query,
            operation=task.operation,
            streaming=False,
            metadata=text_metadata(metadata),
            request_id=request_id,
            span=self._inference.span(task.operation, request.model, request_id, attributes),
        )
        with self._inference.under_way(context):
            async for _ in self._pipeline.run(context):
                pass
        return context
