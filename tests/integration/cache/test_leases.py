"""Of many callers that want one answer, one computes and the others wait for it."""

from __future__ import annotations

import asyncio
import time

import grpc
from google.protobuf.duration_pb2 import Duration

from meshserve.v1 import cache_pb2, types_pb2

HIT = cache_pb2.LookUpResponse.OUTCOME_HIT
MISS = cache_pb2.LookUpResponse.OUTCOME_MISS
PENDING = cache_pb2.LookUpResponse.OUTCOME_PENDING
KEY = cache_pb2.CacheKey(scope="s", model="m", request=b"r")


def duration(seconds: float) -> Duration:
    value = Duration()
    value.FromMilliseconds(round(seconds * 1000))
    return value


def an_answer() -> cache_pb2.CachedAnswer:
    return cache_pb2.CachedAnswer(
        chunks=[cache_pb2.CachedChunk(text="Paris.")],
        ends=[cache_pb2.CachedEnd(finish_reason=types_pb2.FINISH_REASON_STOP)],
    )


def look_up(cache, *, lease_s: float | None = None, wait_s: float = 0, timeout: float | None = 30):
    request = cache_pb2.LookUpRequest(key=KEY, wait=duration(wait_s))
    if lease_s is not None:
        request.lease_ttl.CopyFrom(duration(lease_s))
    return cache.LookUp(request, timeout=timeout)


def store(cache, token: str):
    return cache.Store(cache_pb2.StoreRequest(key=KEY, answer=an_answer(), lease_token=token))


async def test_a_lease_goes_to_one_caller_alone(cache):
    responses = await asyncio.gather(*(look_up(cache, lease_s=5) for _ in range(20)))
    outcomes = [response.outcome for response in responses]
    assert sorted(outcomes) == [MISS] + [PENDING] * 19
    assert sum(bool(response.lease.token) for response in responses) == 1


async def test_a_lease_says_when_it_ends(cache):
    lease = (await look_up(cache, lease_s=5)).lease
    assert 4 < lease.expire_time.ToMilliseconds() / 1000 - time.time() < 6


async def test_a_hundred_callers_coalesce_to_one_computation(make_cache):
    """Over two replicas, so that neither the one nor the other alone can be what does it."""
    computed = 0

    async def ask(cache) -> cache_pb2.CachedAnswer:
        nonlocal computed
        found = await look_up(cache, lease_s=20, wait_s=20)
        if found.outcome == HIT:
            return found.answer
        assert found.outcome == MISS
        computed += 1
        await asyncio.sleep(0.3)
        assert (await store(cache, found.lease.token)).stored
        return an_answer()

    async with make_cache() as first, make_cache() as second:
        answers = await asyncio.gather(*(ask((first, second)[i % 2]) for i in range(100)))
        assert computed == 1
        assert all(answer.chunks == an_answer().chunks for answer in answers)
        stats = [await cache.GetStats(cache_pb2.GetStatsRequest()) for cache in (first, second)]
        assert sum(each.coalesced for each in stats) == 99
        assert sum(each.hits for each in stats) == 99
        assert sum(each.misses for each in stats) == 1


async def test_waiters_of_another_replica_wake_promptly(make_cache):
    async with make_cache() as first, make_cache() as second:
        token = (await look_up(first, lease_s=20)).lease.token
        waiter = asyncio.create_task(_timed(look_up(second, wait_s=20)))
        await asyncio.sleep(1.0)
        await store(first, token)
        stored_at = time.monotonic()
        response, at = await waiter
        assert response.outcome == HIT
        assert at - stored_at < 5, "it would have waited for 20 s"


async def test_when_the_holder_dies_a_waiter_takes_over(make_cache):
    async with make_cache() as cache:
        assert (await look_up(cache, lease_s=0.3)).outcome == MISS
        waiters = [asyncio.ensure_future(look_up(cache, lease_s=10, wait_s=10)) for _ in range(10)]
        done, pending = await asyncio.wait(waiters, timeout=1.0)
        (heir,) = done
        assert heir.result().outcome == MISS
        await store(cache, heir.result().lease.token)
        responses = await asyncio.gather(*pending)
        assert [response.outcome for response in responses] == [HIT] * 9


async def test_a_released_lease_goes_to_a_waiter_at_once(cache):
    token = (await look_up(cache, lease_s=20)).lease.token
    waiter = asyncio.create_task(_timed(look_up(cache, lease_s=10, wait_s=10)))
    await asyncio.sleep(0.5)
    request = cache_pb2.ReleaseLeaseRequest(key=KEY, lease_token=token)
    assert (await cache.ReleaseLease(request)).released
    released_at = time.monotonic()
    response, at = await waiter
    assert response.outcome == MISS
    assert response.lease.token
    assert at - released_at < 5, "it would have waited for 10 s"
    assert not (await cache.ReleaseLease(request)).released


async def test_who_wants_no_lease_learns_that_the_holder_gave_up(cache):
    token = (await look_up(cache, lease_s=20)).lease.token
    waiter = asyncio.ensure_future(look_up(cache, wait_s=10))
    await asyncio.sleep(0.1)
    await cache.ReleaseLease(cache_pb2.ReleaseLeaseRequest(key=KEY, lease_token=token))
    response = await waiter
    assert response.outcome == MISS
    assert not response.HasField("lease")


async def test_waiting_ends_in_time(cache):
    await look_up(cache, lease_s=20)
    response, took_s = await _took(look_up(cache, wait_s=0.2))
    assert response.outcome == PENDING
    assert 0.15 < took_s < 10


async def test_waiting_never_outlasts_the_deadline(cache):
    await look_up(cache, lease_s=20)
    response = await look_up(cache, wait_s=20, timeout=1)
    assert response.outcome == PENDING


async def test_a_waiter_that_leaves_disturbs_nobody(cache):
    token = (await look_up(cache, lease_s=20)).lease.token
    leaving = [look_up(cache, wait_s=20) for _ in range(20)]
    staying = asyncio.ensure_future(look_up(cache, wait_s=20))
    await asyncio.sleep(0.2)
    for call in leaving:
        assert call.cancel()
    await store(cache, token)
    assert (await staying).outcome == HIT


async def test_another_callers_token_releases_nothing(cache):
    old = (await look_up(cache, lease_s=0.05)).lease.token
    await asyncio.sleep(0.1)
    await look_up(cache, lease_s=20)
    request = cache_pb2.ReleaseLeaseRequest(key=KEY, lease_token=old)
    assert not (await cache.ReleaseLease(request)).released
    assert (await look_up(cache)).outcome == PENDING


async def test_a_late_answer_is_kept_and_leaves_the_new_lease_alone(cache):
    late = (await look_up(cache, lease_s=0.05)).lease.token
    await asyncio.sleep(0.1)
    new = (await look_up(cache, lease_s=20)).lease.token
    assert (await store(cache, late)).stored
    assert (await look_up(cache)).outcome == HIT
    request = cache_pb2.ReleaseLeaseRequest(key=KEY, lease_token=new)
    assert (await cache.ReleaseLease(request)).released


async def test_an_answer_too_large_to_keep_ends_the_lease(make_cache):
    async with make_cache(max_answer_bytes=4) as cache:
        token = (await look_up(cache, lease_s=20)).lease.token
        assert not (await store(cache, token)).stored
        assert (await look_up(cache, lease_s=20)).outcome == MISS


async def test_a_waiter_whose_client_is_gone_does_not_take_the_lease(cache):
    token = (await look_up(cache, lease_s=20)).lease.token
    gone = look_up(cache, lease_s=20, wait_s=20)
    await asyncio.sleep(0.1)
    gone.cancel()
    await asyncio.sleep(0.1)
    await cache.ReleaseLease(cache_pb2.ReleaseLeaseRequest(key=KEY, lease_token=token))
    assert (await look_up(cache, lease_s=20)).outcome == MISS
    assert gone.cancelled()
    assert await gone.code() is grpc.StatusCode.CANCELLED


async def _timed(call) -> tuple[cache_pb2.LookUpResponse, float]:
    return await call, time.monotonic()


async def _took(call) -> tuple[cache_pb2.LookUpResponse, float]:
    started = time.monotonic()
    return await call, time.monotonic() - started
