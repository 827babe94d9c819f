"""`meshserve embed`, `classify` and `score`: answers on standard output, and nothing else."""

from __future__ import annotations

import json
from collections.abc import Callable

import pytest

from meshserve.v1 import gateway_pb2, types_pb2
from tests.fakes.scripted_gateway import ScriptedGateway


def vectors(request: gateway_pb2.EmbedRequest, context: object) -> gateway_pb2.EmbedResponse:
    return gateway_pb2.EmbedResponse(
        model="m",
        embeddings=[types_pb2.Embedding(values=[len(text), 0.25]) for text in request.texts],
        usage=types_pb2.Usage(prompt_tokens=7),
    )


def test_embed_writes_a_vector_a_line(gateway: ScriptedGateway, meshserve: Callable) -> None:
    gateway.on("Embed", vectors)
    result = meshserve("embed", "--target", gateway.target, "a", "bcd")
    assert (result.code, result.err) == (0, "")
    assert result.out == "[1.0, 0.25]\n[3.0, 0.25]\n"


def test_options_reach_the_gateway(gateway: ScriptedGateway, meshserve: Callable) -> None:
    gateway.on("Embed", vectors)
    flags = ["--dimensions", "8", "--pooling", "last", "--no-normalize", "--no-cache"]
    meshserve("embed", "--target", gateway.target, "-m", "minilm", "--truncate", *flags, "a")
    assert gateway.requests[0] == gateway_pb2.EmbedRequest(
        model="minilm",
        texts=["a"],
        dimensions=8,
        pooling=types_pb2.POOLING_LAST,
        normalize=False,
        truncation=types_pb2.TRUNCATION_POLICY_DROP_NEWEST,
        cache_control=types_pb2.CacheControl(no_cache=True),
    )


def test_texts_come_from_the_lines_of_standard_input(
    gateway: ScriptedGateway, meshserve: Callable
) -> None:
    gateway.on("Embed", vectors)
    result = meshserve("embed", "--target", gateway.target, "--json", stdin=b"one\n\ntwo two\r\n")
    assert list(gateway.requests[0].texts) == ["one", "two two"]
    written = json.loads(result.out)
    assert [vector[0] for vector in written["vectors"]] == [3, 7]
    assert (written["model"], written["usage"]["prompt_tokens"]) == ("m", 7)


@pytest.mark.parametrize("command", [["embed"], ["classify"], ["score", "query"]])
def test_no_text_at_all_is_wrong_usage(meshserve: Callable, command: list[str]) -> None:
    result = meshserve(*command, "--target", "127.0.0.1:1", stdin=b"\n")
    assert result.code == 2
    assert "there is no text" in result.err


def test_classify_writes_the_likeliest_class_of_each_text(
    gateway: ScriptedGateway, meshserve: Callable
) -> None:
    score = types_pb2.ClassScore
    gateway.on(
        "Classify",
        lambda request, context: gateway_pb2.ClassifyResponse(
            classifications=[
                types_pb2.Classification(scores=[score(label="good", score=0.75)])
                for _ in request.texts
            ]
        ),
    )
    result = meshserve("classify", "--target", gateway.target, "I like it", "so do I")
    assert result.out == "0.7500  good  I like it\n0.7500  good  so do I\n"
    assert gateway.requests[0].top_k == 1


def test_score_writes_the_best_document_first(
    gateway: ScriptedGateway, meshserve: Callable
) -> None:
    gateway.on("Score", lambda request, context: gateway_pb2.ScoreResponse(scores=[0.25, 0.5]))
    result = meshserve("score", "--target", gateway.target, "where?", "here", "there")
    assert result.out == "0.5000  there\n0.2500  here\n"
    assert gateway.requests[0] == gateway_pb2.ScoreRequest(
        query="where?", documents=["here", "there"]
    )
    kept = meshserve("score", "--target", gateway.target, "--json", "where?", "here", "there")
    assert json.loads(kept.out)["scores"] == [0.25, 0.5]
