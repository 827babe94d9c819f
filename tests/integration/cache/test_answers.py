"""Answers come back whole to whoever may have them, for as long as they may be served."""

from __future__ import annotations

import asyncio

import grpc
import pytest
from google.protobuf.duration_pb2 import Duration

from meshserve.v1 import cache_pb2, types_pb2
from services.cache.keys import EntryKey
from services.runtime.errors import Reason, ServiceError

HIT = cache_pb2.LookUpResponse.OUTCOME_HIT
MISS = cache_pb2.LookUpResponse.OUTCOME_MISS


def cache_key(request: bytes = b"r", scope: str = "", model: str = "m") -> cache_pb2.CacheKey:
    return cache_pb2.CacheKey(scope=scope, model=model, request=request)


def an_answer(text: str = "Paris.") -> cache_pb2.CachedAnswer:
    stop = types_pb2.FINISH_REASON_STOP
    return cache_pb2.CachedAnswer(
        chunks=[
            cache_pb2.CachedChunk(index=0, text=text, token_ids=[1, 2]),
            cache_pb2.CachedChunk(index=1, text="Rome."),
            cache_pb2.CachedChunk(index=0, text=" \N{GRINNING FACE}"),
        ],
        ends=[
            cache_pb2.CachedEnd(
                index=index,
                finish_reason=stop,
                matched_stop=types_pb2.MatchedStop(text="\n"),
                usage=types_pb2.Usage(prompt_tokens=7, completion_tokens=3),
            )
            for index in range(2)
        ],
        model_revision="rev",
    )


async def look_up(cache, key) -> cache_pb2.LookUpResponse:
    return await cache.LookUp(cache_pb2.LookUpRequest(key=key))


async def store(cache, key, answer=None, **fields) -> bool:
    request = cache_pb2.StoreRequest(key=key, answer=answer or an_answer(), **fields)
    return (await cache.Store(request)).stored


async def failure(call) -> ServiceError:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await call
    return ServiceError.from_rpc_error(caught.value, peer="cache")


async def test_an_answer_is_replayed_as_it_was_stored(cache):
    assert (await look_up(cache, cache_key())).outcome == MISS
    assert await store(cache, cache_key())
    found = await look_up(cache, cache_key())
    assert found.outcome == HIT
    assert found.answer.HasField("create_time")
    found.answer.ClearField("create_time")
    assert found.answer == an_answer()


async def test_large_answers_survive_compression(cache):
    answer = an_answer("the quick brown fox " * 50_000)
    assert await store(cache, cache_key(), answer)
    assert (await look_up(cache, cache_key())).answer.chunks == answer.chunks


async def test_an_answer_ends_with_its_ttl(cache):
    await store(cache, cache_key(), ttl=Duration(nanos=150_000_000))
    assert (await look_up(cache, cache_key())).outcome == HIT
    await asyncio.sleep(0.2)
    assert (await look_up(cache, cache_key())).outcome == MISS
    assert (await cache.GetStats(cache_pb2.GetStatsRequest())).entries == 0


async def test_every_key_in_the_server_has_a_ttl(cache, client):
    await store(cache, cache_key())
    await cache.LookUp(
        cache_pb2.LookUpRequest(key=cache_key(b"other"), lease_ttl=Duration(seconds=5))
    )
    await cache.Invalidate(cache_pb2.InvalidateRequest(key=cache_key(b"third")))
    names = await client.execute("KEYS", "*")
    assert len(names) >= 7
    for name in names:
        assert await client.execute("PTTL", name) > 0, name


async def test_scopes_and_models_never_see_each_others_answers(cache):
    await store(cache, cache_key(scope="tenant-a", model="m1"))
    for other in (
        cache_key(scope="tenant-b", model="m1"),
        cache_key(scope="", model="m1"),
        cache_key(scope="tenant-a", model="m2"),
        cache_key(b"r2", scope="tenant-a", model="m1"),
    ):
        assert (await look_up(cache, other)).outcome == MISS
    assert (await look_up(cache, cache_key(scope="tenant-a", model="m1"))).outcome == HIT


async def test_replicas_share_answers(make_cache):
    async with make_cache() as first, make_cache() as second:
        await store(first, cache_key())
        assert (await look_up(second, cache_key())).outcome == HIT


async def test_an_oversized_answer_is_not_kept(make_cache):
    async with make_cache(max_answer_bytes=1000) as cache:
        assert not await store(cache, cache_key(), an_answer("x" * 1000))
        assert (await look_up(cache, cache_key())).outcome == MISS
        stats = await cache.GetStats(cache_pb2.GetStatsRequest())
        assert (stats.rejected_stores, stats.stores) == (1, 0)


@pytest.mark.parametrize(
    "damage",
    [
        lambda value: value[:-1] + bytes([value[-1] ^ 1]),
        lambda value: b"MSA0" + value[4:],
        lambda value: value[:10],
        lambda value: b"",
        lambda value: b"not ours at all, but long enough to be taken for an answer of ours",
    ],
    ids=["flipped bit", "old version", "truncated", "empty", "foreign"],
)
async def test_an_unusable_answer_is_a_miss_and_is_deleted(cache, client, damage):
    await store(cache, cache_key())
    name = EntryKey.of(cache_key()).answer
    await client.execute("SET", name, damage(await client.execute("GET", name)), "PX", 60000)
    assert (await look_up(cache, cache_key())).outcome == MISS
    assert await client.execute("EXISTS", name) == 0
    assert (await cache.GetStats(cache_pb2.GetStatsRequest())).entries == 0
    await store(cache, cache_key())
    assert (await look_up(cache, cache_key())).outcome == HIT


async def test_an_answer_copied_to_another_key_is_not_served(cache, client):
    await store(cache, cache_key(b"mine"))
    source, target = (EntryKey.of(cache_key(r)).answer for r in (b"mine", b"yours"))
    await client.execute("COPY", source, target)
    assert (await look_up(cache, cache_key(b"yours"))).outcome == MISS
    assert (await look_up(cache, cache_key(b"mine"))).outcome == HIT


async def test_unfinished_answers_are_refused_with_the_field(cache):
    filtered = an_answer()
    filtered.ends[1].finish_reason = types_pb2.FINISH_REASON_CONTENT_FILTER
    error = await failure(store(cache, cache_key(), filtered))
    assert error.reason is Reason.INVALID_FIELD
    assert error.code is grpc.StatusCode.INVALID_ARGUMENT
    assert error.field_violations[0][0] == "answer.ends[1].finish_reason"
    assert (await look_up(cache, cache_key())).outcome == MISS


@pytest.mark.parametrize(
    ("request_", "field"),
    [
        (cache_pb2.LookUpRequest(), "key.model"),
        (cache_pb2.LookUpRequest(key=cache_key(b"")), "key.request"),
        (cache_pb2.LookUpRequest(key=cache_key(), wait=Duration(seconds=-1)), "wait"),
        (cache_pb2.LookUpRequest(key=cache_key(), lease_ttl=Duration()), "lease_ttl"),
        (cache_pb2.LookUpRequest(key=cache_key(), lease_ttl=Duration(seconds=86400)), "lease_ttl"),
        (cache_pb2.StoreRequest(key=cache_key()), "answer.ends"),
        (cache_pb2.StoreRequest(key=cache_key(), answer=an_answer(), ttl=Duration()), "ttl"),
        (
            cache_pb2.StoreRequest(key=cache_key(), answer=an_answer(), lease_token="x"),
            "lease_token",
        ),
        (cache_pb2.ReleaseLeaseRequest(key=cache_key()), "lease_token"),
        (cache_pb2.ReleaseLeaseRequest(key=cache_key(), lease_token="\0"), "lease_token"),
        (cache_pb2.InvalidateRequest(), "target"),
        (cache_pb2.InvalidateRequest(all=False), "all"),
        (cache_pb2.InvalidateRequest(model=""), "model"),
        (cache_pb2.InvalidateRequest(key=cache_pb2.CacheKey()), "key.model"),
    ],
)
async def test_bad_requests_name_the_field(cache, request_, field):
    method = type(request_).__name__.removesuffix("Request")
    error = await failure(getattr(cache, method)(request_))
    assert error.reason is Reason.INVALID_FIELD
    assert error.field_violations[0][0] == field


async def test_stats_count_what_happened(cache):
    await look_up(cache, cache_key())
    await store(cache, cache_key())
    await store(cache, cache_key(b"2"))
    await store(cache, cache_key(b"2"))
    await look_up(cache, cache_key())
    stats = await cache.GetStats(cache_pb2.GetStatsRequest())
    assert (stats.hits, stats.misses, stats.stores, stats.entries) == (1, 1, 3, 2)
    assert (stats.coalesced, stats.backend_errors, stats.rejected_stores) == (0, 0, 0)
