"""The path of requests for embeddings, between an engine, a tokenizer and a cache of the test's."""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import AsyncIterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import grpc
import pytest

from meshserve.v1 import gateway_pb2, types_pb2
from services.gateway.encoding.encode import (
    CALL_INPUTS,
    CALL_TOKENS,
    CALLS_OF_A_REPLICA,
    parts_of,
)
from services.gateway.encoding.look_up import vector_keys
from services.runtime.errors import Reason, ServiceError
from tests.fakes.scripted_mesh import ScriptedMesh, encode
from tests.support.errors import Failure, failure_of
from tests.support.waiting import until

CARD = "4111 1111 1111 1111"
EMBED = types_pb2.MODEL_CAPABILITY_EMBED


def can_embed(mesh: ScriptedMesh) -> ScriptedMesh:
    mesh.engine.capabilities = [EMBED]
    return mesh


@pytest.fixture
async def mesh(tmp_path: Path) -> AsyncIterator[ScriptedMesh]:
    async with can_embed(ScriptedMesh(tmp_path, cache={"enabled": True})) as started:
        yield started


async def embed(
    mesh: ScriptedMesh, *texts: str, key: str = "", **fields: Any
) -> gateway_pb2.EmbedResponse:
    metadata = (("authorization", f"Bearer {key}"),) if key else ()
    request = gateway_pb2.EmbedRequest(texts=texts, **fields)
    return await mesh.stub.Embed(request, timeout=20, metadata=metadata)


async def failure(call: Any) -> Failure:
    with pytest.raises(grpc.RpcError) as error:
        await call
    return failure_of(error.value)


def vector_of(text: str) -> list[float]:
    return [len(encode(text)), encode(text)[0]]


def vectors(response: gateway_pb2.EmbedResponse) -> list[list[float]]:
    return [list(each.values) for each in response.embeddings]


async def test_vectors_come_in_the_order_of_the_texts(mesh: ScriptedMesh) -> None:
    texts = [f"{number} times" for number in range(3000)]
    assert vectors(await embed(mesh, *texts)) == [vector_of(text) for text in texts]


async def test_what_the_cache_has_is_neither_tokenized_nor_computed(mesh: ScriptedMesh) -> None:
    await embed(mesh, "b")
    await until(lambda: mesh.cache.vectors)
    mesh.tokenizer.encoded.clear()
    answer = await embed(mesh, "a", "b", "c")
    assert vectors(answer) == [vector_of(text) for text in "abc"]
    assert (answer.cached_embeddings, answer.usage.prompt_tokens) == (1, 3)
    assert mesh.tokenizer.encoded == ["a", "c"]
    assert mesh.engine.embedded == [encode(text) for text in "bac"]


async def test_a_cache_that_is_away_costs_no_answer(mesh: ScriptedMesh) -> None:
    await mesh.kill("cache")
    assert vectors(await embed(mesh, "a")) == [vector_of("a")]


async def test_a_request_may_keep_away_from_the_cache(mesh: ScriptedMesh) -> None:
    await embed(mesh, "a", cache_control=types_pb2.CacheControl(no_cache=True))
    assert not mesh.cache.vectors
    await embed(mesh, "a", cache_control=types_pb2.CacheControl(no_store=True))
    await asyncio.sleep(0.05)
    assert not mesh.cache.vectors


async def test_a_redacted_text_is_computed_as_redacted_and_the_others_as_they_are(
    mesh: ScriptedMesh,
) -> None:
    answer = await embed(mesh, "a", f"Pay with {CARD} now", "b")
    assert mesh.engine.embedded == [encode(text) for text in ("a", "Pay with [redacted] now", "b")]
    assert [each.text_index for each in answer.prompt_safety.findings] == [1]


async def test_a_blocked_text_is_named_and_nothing_is_computed(mesh: ScriptedMesh) -> None:
    await embed(mesh, "a")
    await until(lambda: mesh.cache.vectors)
    mesh.engine.embedded.clear()
    refused = await failure(embed(mesh, "a", "b", "stop here", "c"))
    assert refused.reason == "PROMPT_BLOCKED"
    assert refused.fields == ("texts[2]",), "by its index in the request"
    assert not mesh.engine.embedded


async def test_what_the_engine_refuses_is_named_as_the_caller_knows_it(mesh: ScriptedMesh) -> None:
    await embed(mesh, "a")
    await until(lambda: mesh.cache.vectors)
    mesh.engine.embed_failure = ServiceError(
        Reason.INVALID_FIELD, "no", field_violations=[("inputs[1].token_ids", "no")]
    )
    refused = await failure(embed(mesh, "a", "b", "c"))
    assert refused.fields == ("texts[2].token_ids",)


async def test_a_part_that_fails_ends_the_others(mesh: ScriptedMesh) -> None:
    mesh.engine.embed_failure = ServiceError(Reason.SEQUENCE_FAILED, "no")
    refused = await failure(embed(mesh, *map(str, range(3000))))
    assert refused.reason == "SEQUENCE_FAILED"
    await until(lambda: not mesh.engine.active)
    assert mesh.count("meshserve_gateway_active_requests") == 0


async def test_a_request_of_many_parts_has_few_of_them_in_the_engine(mesh: ScriptedMesh) -> None:
    mesh.engine.may_embed.clear()
    texts = list(map(str, range(5 * CALL_INPUTS)))
    call = asyncio.ensure_future(embed(mesh, *texts))
    await until(lambda: mesh.engine.active == CALLS_OF_A_REPLICA)
    with pytest.raises(TimeoutError):
        await until(lambda: mesh.engine.active > CALLS_OF_A_REPLICA, within_s=0.2)
    mesh.engine.may_embed.set()
    assert vectors(await call) == list(map(vector_of, texts))


async def test_a_full_queue_holds_up_what_is_under_way_and_refuses_what_is_new(
    mesh: ScriptedMesh,
) -> None:
    mesh.engine.may_embed.clear()
    texts = list(map(str, range(3 * CALL_INPUTS)))
    call = asyncio.ensure_future(embed(mesh, *texts))
    await until(lambda: mesh.engine.active == CALLS_OF_A_REPLICA)
    asked = mesh.engine.embed_calls
    # The calls in the engine are answered; the third part meets a full queue.
    mesh.engine.embed_failure = ServiceError(Reason.QUEUE_FULL, "no room")
    mesh.engine.may_embed.set()
    await until(lambda: mesh.engine.embed_calls >= asked + 2)
    assert not call.done()
    assert (await failure(embed(mesh, "new"))).reason == "QUEUE_FULL"
    mesh.engine.embed_failure = None
    assert vectors(await call) == list(map(vector_of, texts))


async def test_a_caller_who_leaves_ends_the_calls_to_the_engine(mesh: ScriptedMesh) -> None:
    mesh.engine.may_embed.clear()
    call = asyncio.ensure_future(embed(mesh, *map(str, range(3000))))
    await until(lambda: mesh.engine.active == CALLS_OF_A_REPLICA)
    call.cancel()
    await until(lambda: not mesh.engine.active)
    await until(lambda: not mesh.count("meshserve_gateway_active_requests"))


async def test_a_deadline_ends_them_too(mesh: ScriptedMesh) -> None:
    mesh.engine.may_embed.clear()
    with pytest.raises(grpc.RpcError) as refused:
        await mesh.stub.Embed(gateway_pb2.EmbedRequest(texts=["a"]), timeout=0.2)
    assert refused.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED
    await until(lambda: not mesh.engine.active)


async def test_keys_limits_and_ids_hold_for_encoders_too(tmp_path: Path) -> None:
    keys = [{"name": "acme", "sha256": hashlib.sha256(b"secret").hexdigest()}]
    limits = {"auth": {"mode": "required", "keys": keys}, "max_active_requests": 1}
    async with can_embed(ScriptedMesh(tmp_path, gateway=limits)) as mesh:
        assert (await failure(embed(mesh, "a"))).reason == "API_KEY_MISSING"
        assert (await failure(embed(mesh, "a", key="wrong"))).reason == "API_KEY_INVALID"
        mesh.engine.may_embed.clear()
        call = asyncio.ensure_future(embed(mesh, "a", key="secret", request_id="mine"))
        await until(lambda: mesh.engine.active)
        assert (await failure(embed(mesh, "a", key="secret"))).reason == "QUEUE_FULL"
        mesh.engine.may_embed.set()
        assert (await call).request_id == "mine"
        count = mesh.count(
            "meshserve_gateway_inputs_total",
            model="scripted",
            tenant="acme",
            operation="embeddings",
        )
        assert count == 1


async def test_an_encoder_does_not_generate(mesh: ScriptedMesh) -> None:
    refused = await failure(mesh.generate("hello"))
    assert (refused.code, refused.reason) == (
        grpc.StatusCode.UNIMPLEMENTED,
        "CAPABILITY_MISSING",
    )
    assert refused.metadata["capability"] == "MODEL_CAPABILITY_GENERATE"


@pytest.mark.parametrize(
    ("lengths", "replicas", "parts"),
    [
        ([5], 1, 1),
        ([5] * 10, 8, 1),
        ([5] * 64, 2, 2),
        ([5] * 1000, 1, 1),
        ([5] * 3000, 1, 3),
        ([5] * 3000, 4, 4),
        ([512] * 1000, 1, 8),
        ([10_000, *[5] * 3000], 2, 4),
    ],
)
def test_inputs_are_cut_into_calls(lengths: list[int], replicas: int, parts: int) -> None:
    cuts = parts_of(lengths, replicas)
    assert len(cuts) == parts + 1
    assert (cuts[0], cuts[-1]) == (0, len(lengths))
    for start, end in pairwise(cuts):
        assert 0 < end - start <= CALL_INPUTS
        assert sum(lengths[start:end]) <= CALL_TOKENS + max(lengths)


def test_a_vector_has_a_name_of_its_own_for_each_thing_that_decides_it() -> None:
    def named(text: str = "a", revision: str = "1", policy: str = "p", **fields: Any) -> bytes:
        request = gateway_pb2.EmbedRequest(texts=["other", text], **fields)
        return vector_keys(request, revision, policy)[1]

    different = [
        named(),
        named("b"),
        named(revision="2"),
        named(policy="q"),
        named(pooling=types_pb2.POOLING_FIRST),
        named(normalize=False),
        named(normalize=True),
        named(dimensions=8),
        named(truncation=types_pb2.TRUNCATION_POLICY_DROP_NEWEST),
    ]
    assert len(set(different)) == len(different)
    assert named(request_id="x") == named(model="m") == named()
