"""Without its server the cache fails fast and clearly, and mends itself when it is back."""

from __future__ import annotations

import asyncio
import time

import grpc
import pytest
from google.protobuf.duration_pb2 import Duration

from meshserve.v1 import cache_pb2, types_pb2
from services.runtime.errors import Reason, ServiceError

HIT = cache_pb2.LookUpResponse.OUTCOME_HIT
MISS = cache_pb2.LookUpResponse.OUTCOME_MISS
KEY = cache_pb2.CacheKey(model="m", request=b"r")


def look_up(cache, **fields):
    return cache.LookUp(cache_pb2.LookUpRequest(key=KEY, **fields), timeout=20)


def store(cache):
    answer = cache_pb2.CachedAnswer(
        ends=[cache_pb2.CachedEnd(finish_reason=types_pb2.FINISH_REASON_STOP)]
    )
    return cache.Store(cache_pb2.StoreRequest(key=KEY, answer=answer), timeout=20)


async def outage_of(call) -> ServiceError:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await call
    assert caught.value.code() is grpc.StatusCode.UNAVAILABLE
    error = ServiceError.from_rpc_error(caught.value, peer="cache")
    assert error.reason is Reason.CACHE_BACKEND_UNAVAILABLE
    assert error.retry_after_s is not None
    assert 0 < error.retry_after_s <= 1
    return error


async def seconds_until_served(cache) -> float:
    started = time.monotonic()
    while time.monotonic() - started < 60:
        try:
            await look_up(cache)
        except grpc.aio.AioRpcError:
            await asyncio.sleep(0.02)
        else:
            return time.monotonic() - started
    raise AssertionError("the cache did not come back")


async def test_a_dead_server_costs_milliseconds_and_comes_back_by_itself(cache, valkey):
    await store(cache)
    assert (await look_up(cache)).outcome == HIT
    valkey.kill()
    await outage_of(look_up(cache))
    started = time.monotonic()
    for _ in range(50):
        await outage_of(look_up(cache))
        await outage_of(store(cache))
    assert (time.monotonic() - started) / 100 < 0.2
    await outage_of(cache.Invalidate(cache_pb2.InvalidateRequest(all=True)))
    await outage_of(cache.GetStats(cache_pb2.GetStatsRequest()))
    valkey.start()
    assert await seconds_until_served(cache) < 10
    assert (await look_up(cache)).outcome == MISS
    assert (await store(cache)).stored
    assert (await look_up(cache)).outcome == HIT
    stats = await cache.GetStats(cache_pb2.GetStatsRequest())
    assert stats.backend_errors >= 103


async def test_a_hanging_server_costs_one_timeout_then_milliseconds(cache, valkey):
    await store(cache)
    valkey.hang()
    try:
        started = time.monotonic()
        await asyncio.gather(*(outage_of(look_up(cache)) for _ in range(20)))
        assert time.monotonic() - started < 8, "one after another would take 20 s"
        started = time.monotonic()
        for _ in range(20):
            await outage_of(look_up(cache))
        assert (time.monotonic() - started) / 20 < 0.2
    finally:
        valkey.resume()
    assert await seconds_until_served(cache) < 10
    assert (await look_up(cache)).outcome == HIT


async def test_a_restart_between_two_calls_is_not_even_noticed(cache, valkey):
    await asyncio.gather(*(look_up(cache) for _ in range(30)))
    valkey.kill()
    valkey.start()
    assert (await look_up(cache)).outcome == MISS
    assert (await store(cache)).stored
    assert (await cache.GetStats(cache_pb2.GetStatsRequest())).backend_errors == 0


async def test_waiting_callers_hear_of_the_outage_at_once(cache, valkey):
    await look_up(cache, lease_ttl=Duration(seconds=20))
    waiters = [look_up(cache, wait=Duration(seconds=15)) for _ in range(10)]
    await asyncio.sleep(0.3)
    started = time.monotonic()
    valkey.kill()
    await asyncio.gather(*(outage_of(waiter) for waiter in waiters))
    assert time.monotonic() - started < 8, "they would have waited for 15 s"


async def test_a_cache_that_starts_first_serves_once_the_server_is_there(make_cache, valkey):
    valkey.kill()
    async with make_cache() as cache:
        await outage_of(look_up(cache))
        valkey.start()
        assert await seconds_until_served(cache) < 10


async def test_a_full_server_refuses_answers_and_nothing_else_breaks(cache, client):
    await store(cache)
    await client.execute("CONFIG", "SET", "maxmemory-policy", "noeviction")
    await client.execute("CONFIG", "SET", "maxmemory", "1mb")
    await outage_of(store(cache))
    assert (await look_up(cache)).outcome == HIT
    await client.execute("CONFIG", "SET", "maxmemory", "100mb")
    assert (await store(cache)).stored


async def test_cancelled_calls_never_mix_answers_up(cache):
    """Each of many keys keeps its own answer while calls are cancelled in the middle."""

    def key(number: int) -> cache_pb2.CacheKey:
        return cache_pb2.CacheKey(model="m", request=b"%d" % number)

    for number in range(20):
        answer = cache_pb2.CachedAnswer(
            chunks=[cache_pb2.CachedChunk(text=f"answer {number}")],
            ends=[cache_pb2.CachedEnd(finish_reason=types_pb2.FINISH_REASON_STOP)],
        )
        await cache.Store(cache_pb2.StoreRequest(key=key(number), answer=answer))
    for round_ in range(20):
        calls = [
            (number, cache.LookUp(cache_pb2.LookUpRequest(key=key(number)))) for number in range(20)
        ]
        await asyncio.sleep(0.0005 * round_)
        for _, call in calls[::2]:
            call.cancel()
        for number, call in calls[1::2]:
            assert (await call).answer.chunks[0].text == f"answer {number}"
