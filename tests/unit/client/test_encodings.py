"""Vectors, classes and scores: what is asked for, and what comes back without protobuf or numpy."""

from __future__ import annotations

from typing import Any

import pytest

from meshserve import (
    AsyncClient,
    CacheControl,
    ClassScore,
    Client,
    InvalidRequestError,
    SafetyAction,
    Usage,
)
from meshserve.v1 import gateway_pb2, types_pb2
from tests.fakes.scripted_gateway import ScriptedGateway

USAGE = {"prompt_tokens": 9}
EMBEDDED = gateway_pb2.EmbedResponse(
    request_id="r1",
    model="minilm",
    embeddings=[{"values": [0.5, -0.25]}, {"values": [1, 0]}],
    usage=USAGE,
    cached_embeddings=1,
    prompt_safety={"action": "SAFETY_ACTION_FLAG"},
)
CLASSIFIED = gateway_pb2.ClassifyResponse(
    request_id="r2",
    model="critic",
    classifications=[
        {"scores": [{"label": "good", "score": 0.75}, {"label": "bad", "score": 0.25}]},
        {"scores": [{"label": "bad", "score": 0.5}]},
    ],
    usage=USAGE,
)
SCORED = gateway_pb2.ScoreResponse(
    request_id="r3", model="ranker", scores=[0.25, 0.75, 0.5], usage=USAGE
)


def test_vectors_are_lists_of_floats(client: Client, gateway: ScriptedGateway) -> None:
    gateway.answer("Embed", EMBEDDED)
    answer = client.embed(["a", "b"])
    assert answer.vectors == list(answer) == [[0.5, -0.25], [1.0, 0.0]]
    assert all(type(value) is float for vector in answer for value in vector)
    assert (answer.vector, len(answer)) == ([0.5, -0.25], 2)
    assert (answer.request_id, answer.model, answer.cached) == ("r1", "minilm", 1)
    assert answer.usage == Usage(prompt_tokens=9)
    assert answer.prompt_safety is not None
    assert answer.prompt_safety.action is SafetyAction.FLAG


def test_what_is_asked_for_arrives(client: Client, gateway: ScriptedGateway) -> None:
    gateway.answer("Embed", EMBEDDED)
    client.embed("one text")
    client.embed(
        ("a", "b"),
        model="minilm",
        request_id="r",
        pooling="first",
        normalize=False,
        dimensions=8,
        truncation="drop_oldest",
        cache=CacheControl(ttl_s=5),
    )
    assert gateway.requests == [
        gateway_pb2.EmbedRequest(texts=["one text"]),
        gateway_pb2.EmbedRequest(
            texts=["a", "b"],
            model="minilm",
            request_id="r",
            pooling=types_pb2.POOLING_FIRST,
            normalize=False,
            dimensions=8,
            truncation=types_pb2.TRUNCATION_POLICY_DROP_OLDEST,
            cache_control=types_pb2.CacheControl(ttl_s=5),
        ),
    ]


def test_classes_come_likeliest_first(client: Client, gateway: ScriptedGateway) -> None:
    gateway.answer("Classify", CLASSIFIED)
    answer = client.classify(["a", "b"], top_k=2, truncation="drop_newest")
    assert answer.results[0] == (ClassScore("good", 0.75), ClassScore("bad", 0.25))
    assert (answer.labels, len(answer)) == (["good", "bad"], 2)
    (request,) = gateway.requests
    assert (request.top_k, request.truncation) == (2, types_pb2.TRUNCATION_POLICY_DROP_NEWEST)


def test_scores_keep_the_order_of_the_documents(client: Client, gateway: ScriptedGateway) -> None:
    gateway.answer("Score", SCORED)
    answer = client.score("q", ["a", "b", "c"], model="ranker")
    assert (answer.scores, list(answer)) == ([0.25, 0.75, 0.5], [0.25, 0.75, 0.5])
    assert answer.ranking == [1, 2, 0]
    assert gateway.requests == [
        gateway_pb2.ScoreRequest(query="q", documents=["a", "b", "c"], model="ranker")
    ]


async def test_the_asyncio_client_has_the_same_calls(gateway: ScriptedGateway) -> None:
    gateway.answer("Embed", EMBEDDED)
    gateway.answer("Classify", CLASSIFIED)
    gateway.answer("Score", SCORED)
    async with AsyncClient(gateway.target) as client:
        assert (await client.embed(["a", "b"], dimensions=2)).vectors[0] == [0.5, -0.25]
        assert (await client.classify("a")).labels == ["good", "bad"]
        assert (await client.score("q", ["a"])).ranking == [1, 2, 0]
    assert gateway.requests[0].dimensions == 2


@pytest.mark.parametrize(
    ("call", "arguments", "options", "path"),
    [
        ("embed", (["a", 5],), {}, "texts[1]"),
        ("embed", (["a", "\ud800"],), {}, "texts[1]"),
        ("embed", (5,), {}, "texts"),
        ("embed", ("a",), {"pooling": "max"}, "pooling"),
        ("embed", ("a",), {"dimensions": -1}, "dimensions"),
        ("embed", ("a",), {"truncation": "cut"}, "truncation"),
        ("classify", ("a",), {"top_k": "2"}, "top_k"),
        ("score", (5, ["a"]), {}, "query"),
        ("score", ("q", [None]), {}, "documents[0]"),
    ],
)
def test_what_cannot_travel_is_an_error_at_once(
    client: Client,
    gateway: ScriptedGateway,
    call: str,
    arguments: tuple[Any, ...],
    options: dict[str, Any],
    path: str,
) -> None:
    with pytest.raises(InvalidRequestError) as refused:
        getattr(client, call)(*arguments, **options)
    assert [field.path for field in refused.value.fields] == [path]
    assert not gateway.requests


def test_an_unknown_option_is_told_with_the_nearest(client: Client) -> None:
    with pytest.raises(TypeError, match="did you mean 'dimensions'"):
        client.embed("a", dimension=5)  # type: ignore[call-arg]
