"""Vectors of many texts are kept and found in one go, and forgotten like answers."""

from __future__ import annotations

import grpc
import pytest
from google.protobuf.duration_pb2 import Duration

from meshserve.v1 import cache_pb2, types_pb2
from services.cache.keys import EntryKey

TEXTS = [f"text {number}".encode() for number in range(600)]


def embedding(number: int) -> cache_pb2.CachedEmbedding:
    return cache_pb2.CachedEmbedding(
        embedding=types_pb2.Embedding(values=[number, 0.5]), prompt_tokens=number + 1
    )


async def store(cache, texts=TEXTS, scope="a", model="m", **fields) -> int:
    request = cache_pb2.StoreEmbeddingsRequest(
        scope=scope,
        model=model,
        requests=texts,
        embeddings=[embedding(number) for number in range(len(texts))],
        **fields,
    )
    return (await cache.StoreEmbeddings(request)).stored


async def look_up(cache, texts=TEXTS, scope="a", model="m") -> list[cache_pb2.CachedEmbedding]:
    request = cache_pb2.LookUpEmbeddingsRequest(scope=scope, model=model, requests=texts)
    return list((await cache.LookUpEmbeddings(request)).embeddings)


async def entries(cache) -> int:
    return (await cache.GetStats(cache_pb2.GetStatsRequest())).entries


async def test_what_is_kept_is_found_and_what_is_not_is_empty(cache):
    none = cache_pb2.CachedEmbedding()
    assert await look_up(cache) == [none] * len(TEXTS)
    assert await store(cache) == len(TEXTS)
    assert await entries(cache) == len(TEXTS)
    found = await look_up(cache, [b"new", *TEXTS, b"newer"])
    assert found == [none, *(embedding(number) for number in range(len(TEXTS))), none]


async def test_scopes_and_models_never_see_each_others_vectors(cache):
    await store(cache)
    for other in ({"scope": "b"}, {"scope": ""}, {"model": "n"}):
        assert not any(each.HasField("embedding") for each in await look_up(cache, **other))


async def test_an_answer_is_no_vector_of_the_same_name(cache):
    await store(cache, [b"r"])
    key = cache_pb2.CacheKey(scope="a", model="m", request=b"r")
    found = await cache.LookUp(cache_pb2.LookUpRequest(key=key))
    assert found.outcome == cache_pb2.LookUpResponse.OUTCOME_MISS


@pytest.mark.parametrize("target", [{"all": True}, {"scope": "a"}, {"model": "m"}])
async def test_they_are_forgotten_like_answers(cache, target):
    await store(cache)
    await store(cache, scope="b", model="n")
    forgotten = await cache.Invalidate(cache_pb2.InvalidateRequest(**target))
    assert forgotten.invalidated == (2 if target == {"all": True} else 1) * len(TEXTS)
    assert not any(each.HasField("embedding") for each in await look_up(cache))
    others = await look_up(cache, scope="b", model="n")
    assert all(each.HasField("embedding") for each in others) == (target != {"all": True})
    await store(cache)
    assert all(each.HasField("embedding") for each in await look_up(cache))


async def test_they_end_with_their_ttl_and_leave_nothing_for_ever(cache, client):
    await store(cache, ttl=Duration(seconds=100))
    names = await client.execute("KEYS", "*")
    assert len(names) > len(TEXTS)
    for name in names:
        assert await client.execute("PTTL", name) > 0, name


async def test_one_that_was_damaged_is_passed_over(cache, client):
    await store(cache)
    damaged = EntryKey.of_each("a", "m", [b"embedding\0" + TEXTS[3]])[0].answer
    value = await client.execute("GET", damaged)
    await client.execute("SET", damaged, value[:-1] + bytes([value[-1] ^ 1]), "PX", 60_000)
    found = await look_up(cache)
    assert [each.HasField("embedding") for each in found] == [
        number != 3 for number in range(len(TEXTS))
    ]


@pytest.mark.parametrize(
    "fields",
    [
        {"model": "", "requests": [b"r"]},
        {"model": "m", "requests": []},
        {"model": "m", "requests": [b""]},
        {"model": "m", "requests": [b"r", b"s"], "embeddings": [embedding(1)]},
    ],
)
async def test_what_makes_no_sense_is_refused(cache, fields):
    with pytest.raises(grpc.aio.AioRpcError) as refused:
        await cache.StoreEmbeddings(cache_pb2.StoreEmbeddingsRequest(**fields))
    assert refused.value.code() is grpc.StatusCode.INVALID_ARGUMENT
