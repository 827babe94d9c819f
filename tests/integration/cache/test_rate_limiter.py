"""The rate limit equals a GCRA in Python, and holds over all who share it."""

from __future__ import annotations

import asyncio
import math
import time

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from services.runtime.valkey import (
    RateLimiter,
    ValkeyRefusedError,
    ValkeyUnavailableError,
    connect,
)


class Gcra:
    """ITU-T I.371's virtual scheduling, told the time."""

    def __init__(self) -> None:
        self.tat_us: float = 0

    def acquire(
        self, now_us: int, limit_per_minute: float, burst: int, cost: int
    ) -> tuple[bool, float]:
        interval_us = 60e6 / limit_per_minute
        tolerance_us = interval_us * burst
        self.tat_us = min(max(self.tat_us, now_us), now_us + tolerance_us)
        early_us = self.tat_us + interval_us * cost - tolerance_us - now_us
        if early_us > 0.5:
            return False, early_us / 1e6
        self.tat_us += interval_us * cost
        return True, 0.0


steps = st.lists(
    st.tuples(
        st.sampled_from([0.0, 0.0, 0.0, 0.001, 0.004]),
        st.sampled_from([60, 600, 6000.5, 20000, 60000]),
        st.integers(1, 8),
        st.integers(1, 8),
    ),
    min_size=1,
    max_size=25,
)


def run_steps(url: str, key: str, steps_: list[tuple[float, float, int, int]]) -> None:
    async def run() -> None:
        async with connect(url) as client:
            limiter, model = RateLimiter(client), Gcra()
            for pause_s, limit, burst, cost in steps_:
                cost = min(cost, burst)
                await asyncio.sleep(pause_s)
                decision = await limiter.acquire(
                    key, limit_per_minute=limit, burst=burst, cost=cost
                )
                allowed, retry_after_s = model.acquire(decision.server_time_us, limit, burst, cost)
                assert decision.allowed == allowed
                assert decision.retry_after_s == pytest.approx(retry_after_s, abs=2e-6)
                assert 0 <= decision.remaining <= burst
                backlog_us = model.tat_us - decision.server_time_us
                assert decision.reset_after_s == pytest.approx(backlog_us / 1e6, abs=2e-6)
                room = burst - backlog_us * limit / 60e6
                assert decision.remaining == pytest.approx(math.floor(room + 1e-6), abs=1)

    asyncio.run(run())


@settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(steps)
def test_decisions_equal_the_model(valkey, steps_):
    """Limits and bursts change from step to step, as they may when the configuration is reloaded.

    Times come from the server, and keys of one example never meet those of another.
    """
    run_steps(valkey.url, f"property-{time.monotonic_ns()}", steps_)


@pytest.fixture
def limiter(client) -> RateLimiter:
    return RateLimiter(client)


async def test_a_burst_passes_and_the_next_waits_its_turn(limiter):
    decisions = [await limiter.acquire("k", limit_per_minute=60, burst=5) for _ in range(6)]
    assert [decision.allowed for decision in decisions] == [True] * 5 + [False]
    assert [decision.remaining for decision in decisions] == [4, 3, 2, 1, 0, 0]
    assert 0.8 < decisions[5].retry_after_s <= 1.0


async def test_waiting_as_long_as_told_is_enough(limiter):
    async def acquire():
        return await limiter.acquire("k", limit_per_minute=600, burst=2)

    while (decision := await acquire()).allowed:
        pass
    await asyncio.sleep(decision.retry_after_s)
    assert (await acquire()).allowed


async def test_keys_have_allowances_of_their_own(limiter):
    assert (await limiter.acquire("a", limit_per_minute=1, burst=1)).allowed
    assert not (await limiter.acquire("a", limit_per_minute=1, burst=1)).allowed
    assert (await limiter.acquire("b", limit_per_minute=1, burst=1)).allowed


async def test_the_limit_holds_over_concurrent_clients(valkey):
    """Two clients and 400 requests at once: the burst and what has accrued since pass, no more."""
    async with connect(valkey.url) as first, connect(valkey.url) as second:
        limiters = RateLimiter(first), RateLimiter(second)
        started = time.monotonic()
        decisions = await asyncio.gather(
            *(limiters[i % 2].acquire("shared", limit_per_minute=600, burst=50) for i in range(400))
        )
        accrued = (time.monotonic() - started) * 10
    allowed = sum(decision.allowed for decision in decisions)
    assert 50 <= allowed <= 50 + math.ceil(accrued)


async def test_sustained_load_passes_at_the_limit(limiter):
    burst, per_s = 20, 20
    started = time.monotonic()
    allowed = 0
    while (elapsed_s := time.monotonic() - started) < 1.5:
        allowed += (await limiter.acquire("k", limit_per_minute=60 * per_s, burst=burst)).allowed
        await asyncio.sleep(0.001)
    accrued = elapsed_s * per_s
    assert burst + 0.8 * accrued <= allowed <= burst + accrued + 1


async def test_a_refused_request_costs_nothing(limiter):
    await limiter.acquire("k", limit_per_minute=60, burst=10, cost=8)
    for _ in range(20):
        assert not (await limiter.acquire("k", limit_per_minute=60, burst=10, cost=5)).allowed
    assert (await limiter.acquire("k", limit_per_minute=60, burst=10, cost=2)).allowed


async def test_a_raised_limit_helps_at_once(limiter):
    for _ in range(3):
        await limiter.acquire("k", limit_per_minute=1, burst=3)
    refused = await limiter.acquire("k", limit_per_minute=6000, burst=3)
    assert refused.retry_after_s <= 0.01
    await asyncio.sleep(0.02)
    assert (await limiter.acquire("k", limit_per_minute=6000, burst=3)).allowed


async def test_idle_keys_leave_nothing_behind(limiter, client):
    await limiter.acquire("k", limit_per_minute=60000, burst=20, cost=20)
    await asyncio.sleep(0.1)
    assert await client.execute("KEYS", "meshserve:rate:*") == []


@pytest.mark.parametrize(
    ("limit", "burst", "cost"), [(0, 1, 1), (-1, 1, 1), (math.nan, 1, 1), (60, 1, 2), (60, 1, 0)]
)
async def test_senseless_numbers_are_refused(limiter, limit, burst, cost):
    with pytest.raises(ValueError):
        await limiter.acquire("k", limit_per_minute=limit, burst=burst, cost=cost)


async def test_without_a_server_the_caller_decides(limiter, valkey):
    valkey.kill()
    with pytest.raises(ValkeyUnavailableError) as caught:
        await limiter.acquire("k", limit_per_minute=60, burst=1)
    assert caught.value.retry_after_s > 0


async def test_a_key_of_another_type_is_an_error_and_no_decision(limiter, client):
    await client.execute("RPUSH", "meshserve:rate:k", "x")
    with pytest.raises(ValkeyRefusedError):
        await limiter.acquire("k", limit_per_minute=60, burst=1)
