"""What is forgotten is served by no replica any more, and what is not stays."""

from __future__ import annotations

import asyncio

import pytest
from google.protobuf.duration_pb2 import Duration

from meshserve.v1 import cache_pb2, types_pb2
from services.cache.keys import GENERATION_ALL, EntryKey

HIT = cache_pb2.LookUpResponse.OUTCOME_HIT
MISS = cache_pb2.LookUpResponse.OUTCOME_MISS
KEYS = [
    cache_pb2.CacheKey(scope=scope, model=model, request=request)
    for scope in ("", "a", "b")
    for model in ("m1", "m2")
    for request in (b"r1", b"r2")
]


async def store(cache, key, token: str = "") -> bool:
    answer = cache_pb2.CachedAnswer(
        ends=[cache_pb2.CachedEnd(finish_reason=types_pb2.FINISH_REASON_STOP)]
    )
    request = cache_pb2.StoreRequest(key=key, answer=answer, lease_token=token)
    return (await cache.Store(request)).stored


async def lease(cache, key) -> cache_pb2.LookUpResponse:
    return await cache.LookUp(cache_pb2.LookUpRequest(key=key, lease_ttl=Duration(seconds=20)))


async def outcome(cache, key) -> cache_pb2.LookUpResponse.Outcome.ValueType:
    return (await cache.LookUp(cache_pb2.LookUpRequest(key=key))).outcome


async def entries(cache) -> int:
    return (await cache.GetStats(cache_pb2.GetStatsRequest())).entries


TARGETS = {
    "key": (cache_pb2.InvalidateRequest(key=KEYS[5]), lambda key: key == KEYS[5]),
    "scope": (cache_pb2.InvalidateRequest(scope="a"), lambda key: key.scope == "a"),
    "common scope": (cache_pb2.InvalidateRequest(scope=""), lambda key: key.scope == ""),
    "model": (cache_pb2.InvalidateRequest(model="m2"), lambda key: key.model == "m2"),
    "all": (cache_pb2.InvalidateRequest(all=True), lambda key: True),
    "unknown scope": (cache_pb2.InvalidateRequest(scope="zz"), lambda key: False),
    "unknown model": (cache_pb2.InvalidateRequest(model="zz"), lambda key: False),
}


@pytest.mark.parametrize("target", TARGETS)
async def test_exactly_the_target_is_forgotten_in_every_replica(make_cache, target):
    request, is_target = TARGETS[target]
    async with make_cache() as first, make_cache() as second:
        for key in KEYS:
            await store(first, key)
        expected = sum(map(is_target, KEYS))
        assert (await first.Invalidate(request)).invalidated == expected
        for key in KEYS:
            assert await outcome(second, key) == (MISS if is_target(key) else HIT)
        assert await entries(second) == len(KEYS) - expected
        assert (await second.Invalidate(request)).invalidated == 0


@pytest.mark.parametrize("target", TARGETS)
async def test_what_was_forgotten_can_be_stored_again(cache, target):
    request, _ = TARGETS[target]
    for key in KEYS:
        await store(cache, key)
    await cache.Invalidate(request)
    for key in KEYS:
        await store(cache, key)
    await asyncio.sleep(0.1)
    assert [await outcome(cache, key) for key in KEYS] == [HIT] * len(KEYS)
    assert await entries(cache) == len(KEYS)


@pytest.mark.parametrize("target", ["key", "scope", "model", "all"])
async def test_an_answer_computed_before_is_not_kept_after(cache, target):
    request, is_target = TARGETS[target]
    key = next(key for key in reversed(KEYS) if is_target(key))
    token = (await lease(cache, key)).lease.token
    await cache.Invalidate(request)
    assert not await store(cache, key, token)
    assert await outcome(cache, key) == MISS


@pytest.mark.parametrize("target", ["key", "scope", "model", "all"])
async def test_after_forgetting_the_next_caller_computes_at_once(cache, target):
    request, is_target = TARGETS[target]
    key = next(key for key in reversed(KEYS) if is_target(key))
    await lease(cache, key)
    await cache.Invalidate(request)
    again = await lease(cache, key)
    assert again.outcome == MISS
    assert again.lease.token
    assert await store(cache, key, again.lease.token)
    assert await outcome(cache, key) == HIT


async def test_the_memory_of_forgotten_answers_comes_back(cache, client):
    for number in range(300):
        await store(cache, cache_pb2.CacheKey(scope="a", model="m", request=b"%d" % number))
    await store(cache, KEYS[0])
    await cache.Invalidate(cache_pb2.InvalidateRequest(scope="a"))
    for _ in range(100):
        answers = await client.execute("KEYS", "*:answer")
        if len(answers) == 1:
            break
        await asyncio.sleep(0.05)
    assert answers == [EntryKey.of(KEYS[0]).answer.encode()]
    assert await client.execute("KEYS", "*garbage*") == []


async def test_a_lost_generation_forgets_rather_than_confuses(cache, client):
    await store(cache, KEYS[0])
    await client.execute("DEL", GENERATION_ALL)
    assert await outcome(cache, KEYS[0]) == MISS
    await store(cache, KEYS[0])
    assert await outcome(cache, KEYS[0]) == HIT
