"""The engine's answers: vectors, classes or scores of all inputs, in their order."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable, Sequence
from itertools import pairwise
from typing import Any

from meshserve.v1 import engine_pb2, gateway_pb2
from services.gateway.encoding.context import EncodingContext
from services.gateway.encoding.tokenize import rename_inputs
from services.gateway.inference import new_request_id
from services.gateway.models import ModelDirectory
from services.gateway.pipeline import Step, first_error
from services.runtime.errors import Reason, ServiceError

# What one call asks for at most: so much keeps an engine busy for some batches, and another call
# can go to another replica meanwhile.
CALL_INPUTS = 1024
CALL_TOKENS = 65536
# A call with fewer is not worth being made apart, though another replica were idle.
FEWEST_INPUTS = 32
# Calls of one request that a replica has at a time: one to compute, and one to go on with. What
# else there is waits here, where it takes no place in an engine's queue from other requests.
CALLS_OF_A_REPLICA = 2
# After how long an engine whose queue was full is asked again.
FULL_QUEUE_DELAY_S = 0.25


class Encode(Step[EncodingContext]):
    """Spreads the inputs over calls, and the calls over replicas. The first that fails, or a caller
    who leaves, ends them all. A full queue refuses a request of which nothing is computed yet; one
    that is under way waits for room."""

    name = "encode"

    def __init__(self, models: ModelDirectory) -> None:
        self._models = models

    async def before(self, context: EncodingContext) -> None:
        """Sets the answers. Raises ServiceError."""
        if not context.uncached:
            return
        # Its engines may run only while they are asked for.
        context.model = await self._models.with_engine(context.served.name)
        replicas = context.served.engine_calls.replicas.counts()["serving"]
        cuts = parts_of([len(each.token_ids) for each in context.inputs], replicas)
        parts = [slice(start, end) for start, end in pairwise(cuts)]
        if len(parts) == 1:
            await self._call(context, parts[0])
            return
        room = asyncio.Semaphore(CALLS_OF_A_REPLICA * max(1, replicas))

        async def call(part: slice) -> None:
            async with room:
                await self._call(context, part)

        try:
            async with asyncio.TaskGroup() as group:
                for part in parts:
                    group.create_task(call(part))
        except BaseExceptionGroup as failures:
            raise first_error(failures) from None

    async def _call(self, context: EncodingContext, part: slice) -> None:
        try:
            answers = await _ask_until_taken(context, context.inputs[part])
        except ServiceError as error:
            rename_inputs(error, context, part.start)
            raise
        for index, answer in zip(context.uncached[part], answers, strict=True):
            context.answers[index] = answer


async def _ask_until_taken(
    context: EncodingContext, inputs: Sequence[engine_pb2.EncoderInput]
) -> Iterable[Any]:
    while True:
        try:
            return await _ask(context, inputs)
        except ServiceError as error:
            under_way = any(context.answers[index] is not None for index in context.uncached)
            if error.reason is not Reason.QUEUE_FULL or not under_way:
                raise
        await asyncio.sleep(FULL_QUEUE_DELAY_S)


async def _ask(
    context: EncodingContext, inputs: Sequence[engine_pb2.EncoderInput]
) -> Iterable[Any]:
    request, stub = context.request, context.served.engine
    # Its own for each call: the caller's is for all of them.
    name, request_id = context.served.name, new_request_id()
    if isinstance(request, gateway_pb2.ClassifyRequest):
        classify = engine_pb2.EngineServiceClassifyRequest(
            model=name, request_id=request_id, inputs=inputs
        )
        return (await stub.Classify(classify)).classifications
    if isinstance(request, gateway_pb2.ScoreRequest):
        score = engine_pb2.EngineServiceScoreRequest(
            model=name, request_id=request_id, inputs=inputs
        )
        return (await stub.Score(score)).scores
    embed = engine_pb2.EngineServiceEmbedRequest(
        model=name, request_id=request_id, inputs=inputs, pooling=request.pooling
    )
    if request.HasField("normalize"):
        embed.normalize = request.normalize
    if request.HasField("dimensions"):
        embed.dimensions = request.dimensions
    return (await stub.Embed(embed)).embeddings


def parts_of(lengths: Sequence[int], replicas: int) -> list[int]:
    """Where inputs of so many tokens are cut: the beginnings of the parts, and the end of the last.

    Parts hold about as many tokens each, and there are no fewer than replicas to compute them.
    """
    total = sum(lengths)
    wanted = max(
        -(-len(lengths) // CALL_INPUTS),
        -(-total // CALL_TOKENS),
        min(replicas, len(lengths) // FEWEST_INPUTS),
        1,
    )
    cuts, tokens = [0], 0
    for index, length in enumerate(lengths):
        full = index - cuts[-1] >= CALL_INPUTS or tokens >= len(cuts) * total / wanted
        if index > cuts[-1] and full:
            cuts.append(index)
        tokens += length
    return [*cuts, len(lengths)]
