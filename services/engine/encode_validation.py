"""From the contract's request to an encoder to the core's, or the error that names the field."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal

from meshserve.v1 import engine_pb2, types_pb2
from services.engine.core.messages import EncodeRequest, EncodeTask, ModelFacts
from services.engine.validation import check_request_id, missing_capability
from services.runtime.errors import Reason, ServiceError, invalid_field

_POOLINGS: dict[int, Literal["mean", "first", "last"] | None] = {
    types_pb2.POOLING_UNSPECIFIED: None,
    types_pb2.POOLING_MEAN: "mean",
    types_pb2.POOLING_FIRST: "first",
    types_pb2.POOLING_LAST: "last",
}
_MISSING = {
    "embed": "this model makes no embeddings",
    "classify": "this model does not classify",
    "score": "this model does not score pairs",
}


def embed_task(request: engine_pb2.EngineServiceEmbedRequest, facts: ModelFacts) -> EncodeTask:
    """What a request for embeddings wants of each input.

    Raises:
        ServiceError: INVALID_FIELD or CAPABILITY_MISSING.
    """
    check_task("embed", facts)
    if request.pooling not in _POOLINGS:
        raise invalid_field("pooling", "is no way of pooling")
    dimensions = request.dimensions if request.HasField("dimensions") else None
    if dimensions is not None and not 1 <= dimensions <= facts.embedding_size:
        raise invalid_field("dimensions", f"must lie in [1, {facts.embedding_size}]")
    return EncodeTask(
        "embed",
        _POOLINGS[request.pooling],
        request.normalize if request.HasField("normalize") else None,
        dimensions,
    )


def check_task(kind: Literal["embed", "classify", "score"], facts: ModelFacts) -> EncodeTask:
    """The task of a kind, or CAPABILITY_MISSING where the model cannot do it."""
    if kind not in facts.tasks:
        raise missing_capability(kind, _MISSING[kind])
    return EncodeTask(kind)


def encode_requests(
    request_id: str,
    inputs: Sequence[engine_pb2.EncoderInput],
    task: EncodeTask,
    facts: ModelFacts,
    next_sequence_id: Callable[[], int],
    *,
    max_inputs: int,
) -> list[EncodeRequest]:
    """One sequence per input.

    Raises:
        ServiceError: INVALID_FIELD or PROMPT_TOO_LONG.
    """
    check_request_id(request_id)
    if not 1 <= len(inputs) <= max_inputs:
        raise invalid_field("inputs", f"between 1 and {max_inputs} of them")
    return [
        _encode_request(index, each, request_id, task, facts, next_sequence_id())
        for index, each in enumerate(inputs)
    ]


def _encode_request(
    index: int,
    each: engine_pb2.EncoderInput,
    request_id: str,
    task: EncodeTask,
    facts: ModelFacts,
    sequence_id: int,
) -> EncodeRequest:
    token_ids = list(each.token_ids)
    if not token_ids:
        raise invalid_field(f"inputs[{index}].token_ids", "at least one token is needed")
    limit = facts.max_context_tokens
    if len(token_ids) > limit:
        raise ServiceError(
            Reason.PROMPT_TOO_LONG,
            f"input {index} has {len(token_ids)} tokens, and the model takes {limit}",
            field_violations=[(f"inputs[{index}].token_ids", f"at most {limit} tokens")],
            metadata={"context_tokens": str(limit), "prompt_tokens": str(len(token_ids))},
        )
    if max(token_ids) >= facts.vocab_size:
        raise invalid_field(
            f"inputs[{index}].token_ids", f"token ids must lie in [0, {facts.vocab_size})"
        )
    start = each.second_text_start if each.HasField("second_text_start") else None
    if start is not None and not 1 <= start < len(token_ids):
        raise invalid_field(
            f"inputs[{index}].second_text_start", f"must lie in [1, {len(token_ids)})"
        )
    return EncodeRequest(sequence_id, token_ids, task, start, request_id)
