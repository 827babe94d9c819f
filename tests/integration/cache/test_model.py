"""Whatever callers do in whatever order, the cache behaves like a dictionary that forgets."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field

from google.protobuf.duration_pb2 import Duration
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from meshserve.v1 import cache_pb2, types_pb2
from services.runtime.valkey import connect

HIT = cache_pb2.LookUpResponse.OUTCOME_HIT
MISS = cache_pb2.LookUpResponse.OUTCOME_MISS
PENDING = cache_pb2.LookUpResponse.OUTCOME_PENDING

# Scope, model, request.
Name = tuple[str, str, bytes]

# Few, so that what happens to one entry happens often; any two differ in one part alone.
names = st.sampled_from(
    [("", "m1", b"r1"), ("", "m1", b"r2"), ("a", "m1", b"r1"), ("", "m2", b"r1")]
)
steps = st.lists(
    st.one_of(
        st.tuples(st.just("look_up"), names, st.booleans()),
        st.tuples(st.just("store"), names, st.booleans()),
        # Which of the leases given so far, also ones long over.
        st.tuples(st.just("store_under"), st.integers(0, 20), st.none()),
        st.tuples(st.just("release"), st.integers(0, 20), st.none()),
        st.tuples(st.just("invalidate"), names, st.sampled_from(["key", "scope", "model", "all"])),
    ),
    min_size=15,
    max_size=60,
)


@dataclass
class Lease:
    name: Name
    token: str
    # Whether what is computed under it may still be kept.
    current: bool = True


@dataclass
class Model:
    answers: dict[Name, str] = field(default_factory=dict)
    held: dict[Name, Lease] = field(default_factory=dict)
    given: list[Lease] = field(default_factory=list)

    def forget(self, is_target) -> int:
        forgotten = [name for name in self.answers if is_target(name)]
        for name in forgotten:
            del self.answers[name]
        for lease in self.given:
            lease.current = lease.current and not is_target(lease.name)
        self.held = {name: lease for name, lease in self.held.items() if not is_target(name)}
        return len(forgotten)


def key_of(name: Name) -> cache_pb2.CacheKey:
    return cache_pb2.CacheKey(scope=name[0], model=name[1], request=name[2])


def answer_of(text: str) -> cache_pb2.CachedAnswer:
    return cache_pb2.CachedAnswer(
        chunks=[cache_pb2.CachedChunk(text=text)],
        ends=[cache_pb2.CachedEnd(finish_reason=types_pb2.FINISH_REASON_STOP)],
    )


async def look_up(cache, model: Model, name: Name, wants_lease: bool) -> None:
    request = cache_pb2.LookUpRequest(key=key_of(name))
    if wants_lease:
        request.lease_ttl.CopyFrom(Duration(seconds=60))
    found = await cache.LookUp(request)
    if name in model.answers:
        assert found.outcome == HIT
        assert found.answer.chunks[0].text == model.answers[name]
    elif name in model.held:
        assert found.outcome == PENDING
    else:
        assert found.outcome == MISS
        assert bool(found.lease.token) == wants_lease
        if wants_lease:
            model.held[name] = Lease(name, found.lease.token)
            model.given.append(model.held[name])


async def store(cache, model: Model, name: Name, text: str, lease: Lease | None) -> None:
    request = cache_pb2.StoreRequest(key=key_of(name), answer=answer_of(text))
    if lease is not None:
        request.lease_token = lease.token
    stored = (await cache.Store(request)).stored
    assert stored == (lease is None or lease.current)
    if stored:
        model.answers[name] = text
    if lease is not None and model.held.get(name) is lease:
        del model.held[name]


async def release(cache, model: Model, lease: Lease) -> None:
    request = cache_pb2.ReleaseLeaseRequest(key=key_of(lease.name), lease_token=lease.token)
    released = (await cache.ReleaseLease(request)).released
    held = model.held.get(lease.name) is lease
    # A lease that an invalidation made void may still be found and taken away; that frees nobody.
    assert released or not held
    assert not released or held or not lease.current
    if held:
        del model.held[lease.name]


async def invalidate(cache, model: Model, name: Name, target: str) -> None:
    request, is_target = {
        "key": (cache_pb2.InvalidateRequest(key=key_of(name)), lambda other: other == name),
        "scope": (cache_pb2.InvalidateRequest(scope=name[0]), lambda other: other[0] == name[0]),
        "model": (cache_pb2.InvalidateRequest(model=name[1]), lambda other: other[1] == name[1]),
        "all": (cache_pb2.InvalidateRequest(all=True), lambda other: True),
    }[target]
    assert (await cache.Invalidate(request)).invalidated == model.forget(is_target)


async def run_steps(url: str, make_cache, steps_) -> None:
    async with connect(url) as client:
        await client.execute("FLUSHALL")
    model = Model()
    async with make_cache() as cache:
        for number, (action, what, how) in enumerate(steps_):
            if action == "look_up":
                await look_up(cache, model, what, how)
            elif action == "store":
                await store(cache, model, what, f"answer {number}", None)
            elif action == "invalidate":
                await invalidate(cache, model, what, how)
            elif model.given:
                lease = model.given[what % len(model.given)]
                if action == "release":
                    await release(cache, model, lease)
                else:
                    await store(cache, model, lease.name, f"answer {number}", lease)
        stats = await cache.GetStats(cache_pb2.GetStatsRequest())
        assert stats.entries == len(model.answers)


@settings(
    max_examples=120, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(steps)
def test_the_cache_equals_its_model(valkey, make_cache, steps_):
    asyncio.run(run_steps(valkey.url, make_cache, steps_))
