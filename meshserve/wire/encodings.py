"""Requests to encoders as messages, and their answers as values."""

from __future__ import annotations

from collections.abc import Sequence

from meshserve.encodings import Classifications, ClassScore, Embeddings, Scores
from meshserve.options import ClassifyOptions, EmbedOptions, ScoreOptions
from meshserve.types import SafetyVerdict
from meshserve.v1 import gateway_pb2, types_pb2
from meshserve.wire.assign import assign, checked_text, extend, invalid_field, one_of
from meshserve.wire.requests import TRUNCATIONS, fill_cache_control, refuse_unknown
from meshserve.wire.responses import usage, verdict

_POOLINGS = {
    "mean": types_pb2.POOLING_MEAN,
    "first": types_pb2.POOLING_FIRST,
    "last": types_pb2.POOLING_LAST,
}


def embed_request(texts: str | Sequence[str], options: EmbedOptions) -> gateway_pb2.EmbedRequest:
    """The message that asks for vectors. Raises InvalidRequestError."""
    refuse_unknown(options, EmbedOptions)
    request = gateway_pb2.EmbedRequest()
    extend(request, "texts", _listed(texts), "texts")
    _fill_common(request, options)
    pooling = options.get("pooling")
    if pooling is not None:
        if pooling not in _POOLINGS:
            raise invalid_field("pooling", one_of(pooling, _POOLINGS))
        request.pooling = _POOLINGS[pooling]
    for name in ("normalize", "dimensions"):
        assign(request, name, options.get(name), name)
    fill_cache_control(request, options.get("cache"))
    return request


def classify_request(
    texts: str | Sequence[str], options: ClassifyOptions
) -> gateway_pb2.ClassifyRequest:
    """The message that asks for classes. Raises InvalidRequestError."""
    refuse_unknown(options, ClassifyOptions)
    request = gateway_pb2.ClassifyRequest()
    extend(request, "texts", _listed(texts), "texts")
    _fill_common(request, options)
    assign(request, "top_k", options.get("top_k"), "top_k")
    return request


def score_request(
    query: str, documents: Sequence[str], options: ScoreOptions
) -> gateway_pb2.ScoreRequest:
    """The message that asks for scores. Raises InvalidRequestError."""
    refuse_unknown(options, ScoreOptions)
    request = gateway_pb2.ScoreRequest(query=checked_text(query, "query"))
    extend(request, "documents", _listed(documents), "documents")
    _fill_common(request, options)
    return request


def embeddings(response: gateway_pb2.EmbedResponse) -> Embeddings:
    """Vectors as lists of floats."""
    return Embeddings(
        request_id=response.request_id,
        model=response.model,
        vectors=[list(each.values) for each in response.embeddings],
        usage=usage(response.usage),
        cached=response.cached_embeddings,
        prompt_safety=_safety(response),
    )


def classifications(response: gateway_pb2.ClassifyResponse) -> Classifications:
    """Classes of each text."""
    return Classifications(
        request_id=response.request_id,
        model=response.model,
        results=tuple(
            tuple(ClassScore(score.label, score.score) for score in each.scores)
            for each in response.classifications
        ),
        usage=usage(response.usage),
        prompt_safety=_safety(response),
    )


def scores(response: gateway_pb2.ScoreResponse) -> Scores:
    """Scores of each document."""
    return Scores(
        request_id=response.request_id,
        model=response.model,
        scores=list(response.scores),
        usage=usage(response.usage),
        prompt_safety=_safety(response),
    )


def _listed(texts: str | Sequence[str]) -> Sequence[str]:
    return [texts] if isinstance(texts, str) else texts


def _fill_common(
    request: gateway_pb2.EmbedRequest | gateway_pb2.ClassifyRequest | gateway_pb2.ScoreRequest,
    options: EmbedOptions | ClassifyOptions | ScoreOptions,
) -> None:
    for name in ("model", "request_id"):
        assign(request, name, options.get(name), name)
    truncation = options.get("truncation")
    if truncation is not None:
        if truncation not in TRUNCATIONS:
            raise invalid_field("truncation", one_of(truncation, TRUNCATIONS))
        request.truncation = TRUNCATIONS[truncation]


def _safety(
    response: gateway_pb2.EmbedResponse | gateway_pb2.ClassifyResponse | gateway_pb2.ScoreResponse,
) -> SafetyVerdict | None:
    return verdict(response.prompt_safety) if response.HasField("prompt_safety") else None
