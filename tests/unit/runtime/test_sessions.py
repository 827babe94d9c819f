"""Many sessions on one stream, the caller's side, over real gRPC: joined, resumed, bounded."""

from __future__ import annotations

import asyncio
import gc
import weakref
from typing import Any

import pytest
from opentelemetry.sdk.trace import TracerProvider

from services.gateway import sessions
from services.runtime import deadline, exchanges
from services.runtime.errors import Reason, ServiceError
from tests.fakes.decoding import POISON, SILENCE, Decoding, EchoHost, pool_over
from tests.support.waiting import until


async def start(loopback: Any, host: EchoHost, *, health: str = "") -> tuple[Any, Any]:
    """A replica of the tokenizer and a pool over a channel to it."""
    replica = await loopback.serve(host)
    pool = pool_over(loopback.channel(replica))
    loopback.stack.callback(pool.close)
    return replica, pool


async def test_what_sessions_say_at_one_moment_goes_in_one_message(loopback) -> None:
    host = EchoHost()
    _, pool = await start(loopback, host)
    decodings = [Decoding(pool) for _ in range(50)]
    for step in range(3):
        texts = await asyncio.gather(*(decoding.feed(step) for decoding in decodings))
        assert texts == [f"<{step}>"] * 50
    assert host.streams == 1
    assert sum(host.batches) == 150
    assert len(host.batches) <= 9


async def test_sessions_go_on_where_they_were_when_their_replica_is_killed(loopback) -> None:
    host = EchoHost()
    replica, pool = await start(loopback, host)
    decodings = [Decoding(pool) for _ in range(5)]
    for token in (1, 2):
        await asyncio.gather(*(decoding.feed(token) for decoding in decodings))
    await replica.server.stop(0)
    waiting = [asyncio.create_task(decoding.feed(3)) for decoding in decodings]
    await asyncio.sleep(0.2)
    restarted = EchoHost()
    await loopback.serve(restarted, port=replica.port)
    async with asyncio.timeout(8):
        await asyncio.gather(*waiting)
    await asyncio.gather(*(decoding.feed(4, finish=True) for decoding in decodings))
    assert {decoding.text for decoding in decodings} == {"<1><2><3><4>"}
    await until(lambda: host.open_sessions == restarted.open_sessions == 0)


async def test_a_replica_that_stays_away_is_an_error_with_a_time_to_retry(
    loopback, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sessions, "REOPEN_FOR_S", 0.3)
    replica, pool = await start(loopback, EchoHost())
    decoding = Decoding(pool)
    await decoding.feed(1)
    await replica.server.stop(0)
    with pytest.raises(ServiceError) as caught:
        await decoding.feed(2)
    assert caught.value.reason is Reason.SERVICE_UNAVAILABLE
    assert caught.value.retry_after_s is not None
    assert caught.value.metadata == {"service": "tokenizer"}


async def test_sessions_of_a_replica_that_drains_go_on_at_another(loopback) -> None:
    old, new = EchoHost(), EchoHost()
    first, second = await loopback.serve(old), await loopback.serve(new)
    pool = pool_over(loopback.channel(first, second))
    loopback.stack.callback(pool.close)
    await serving(pool, 2)
    begun = [Decoding(pool) for _ in range(4)]
    for decoding in begun:
        await decoding.feed(1)
    assert (old.open_sessions, new.open_sessions) == (2, 2)
    await first.health.shut_down()
    old.draining.set()
    await serving(pool, 1)
    for decoding in [*begun, Decoding(pool)]:
        await decoding.feed(2)
    assert (old.open_sessions, new.open_sessions) == (0, 5)
    assert {decoding.text for decoding in begun} == {"<1><2>"}


async def test_a_session_that_nobody_else_can_take_stays_until_it_ends(loopback) -> None:
    host = EchoHost()
    replica, pool = await start(loopback, host)
    begun = Decoding(pool)
    await begun.feed(1)
    await replica.health.shut_down()
    host.draining.set()
    await serving(pool, 0)
    assert await begun.feed(2, finish=True) == "<2>"
    assert len(host.opened) == 1
    await until(lambda: host.open_sessions == 0)


async def test_new_sessions_go_to_the_replica_with_the_fewest(loopback) -> None:
    hosts = [EchoHost() for _ in range(3)]
    pool = pool_over(loopback.channel(*[await loopback.serve(host) for host in hosts]))
    loopback.stack.callback(pool.close)
    await serving(pool, 3)
    begun = [Decoding(pool) for _ in range(9)]
    await asyncio.gather(*(decoding.feed(1) for decoding in begun))
    assert [host.open_sessions for host in hosts] == [3, 3, 3]
    for decoding in begun:
        decoding.session.cancel()
    assert {replica.in_flight for replica in pool.replicas} == {0}


async def test_a_session_that_has_ended_is_under_way_no_more(loopback) -> None:
    _, pool = await start(loopback, EchoHost())
    (replica,) = pool.replicas
    decoding = Decoding(pool)
    await decoding.feed(1)
    assert replica.in_flight == 1
    await decoding.feed(2, finish=True)
    assert replica.in_flight == 0


async def serving(pool: Any, count: int) -> None:
    """Returns once so many replicas say that they serve."""
    await until(lambda: sum(replica.takes_calls for replica in pool.replicas) == count)


async def test_one_sessions_failure_leaves_the_others_and_the_stream(loopback) -> None:
    host = EchoHost()
    _, pool = await start(loopback, host)
    poisoned, other = Decoding(pool), Decoding(pool)
    await asyncio.gather(poisoned.feed(1), other.feed(1))
    failed, text = await asyncio.gather(
        poisoned.feed(POISON), other.feed(2), return_exceptions=True
    )
    assert isinstance(failed, ServiceError)
    assert failed.reason is Reason.INVALID_FIELD
    assert text == "<2>"
    poisoned.session.cancel()
    assert await other.feed(3, finish=True) == "<3>"
    assert host.streams == 1


async def test_a_deadline_bounds_an_exchange_and_ends_its_session(loopback) -> None:
    host = EchoHost()
    _, pool = await start(loopback, host)
    decoding = Decoding(pool)

    async def request() -> None:
        deadline.set_remaining(0.2)
        await decoding.feed(SILENCE)

    with pytest.raises(ServiceError) as caught:
        await asyncio.create_task(request())
    assert caught.value.reason is Reason.DEADLINE_EXCEEDED
    await until(lambda: host.opened and host.open_sessions == 0)
    assert await Decoding(pool).feed(1) == "<1>", "the stream must outlive the deadline"
    assert host.streams == 1


async def test_a_request_that_is_cancelled_frees_its_session(loopback) -> None:
    host = EchoHost()
    _, pool = await start(loopback, host)
    decoding = Decoding(pool)
    task = asyncio.create_task(decoding.feed(SILENCE))
    await until(lambda: host.opened)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    decoding.session.cancel()
    decoding.session.cancel()
    await until(lambda: host.open_sessions == 0)


async def test_a_session_given_up_before_it_was_sent_is_freed_as_well(loopback) -> None:
    host = EchoHost()
    _, pool = await start(loopback, host)
    await Decoding(pool).feed(1, finish=True)
    decoding = Decoding(pool)
    task = asyncio.create_task(decoding.feed(1))
    await asyncio.sleep(0)
    task.cancel()
    decoding.session.cancel()
    assert await Decoding(pool).feed(2, finish=True) == "<2>"
    await until(lambda: host.open_sessions == 0)
    # The contract: at most one entry of a session in a message.
    assert len(host.opened) in (2, 3)


async def test_a_stream_has_no_span_and_no_deadline_of_the_request_that_opened_it(
    loopback, spans, provider: TracerProvider
) -> None:
    host = EchoHost()
    replica, pool = await start(loopback, host)

    async def request() -> None:
        deadline.set_remaining(0.3)
        with provider.get_tracer("test").start_as_current_span("request"):
            await Decoding(pool).feed(1, finish=True)

    await asyncio.create_task(request())
    await asyncio.sleep(0.4)
    await Decoding(pool).feed(1, finish=True)
    assert host.streams == 1
    pool.close()
    await replica.calls.ended(1.0)
    assert [span.name for span in spans.exporter.get_finished_spans()] == ["request"]


async def test_a_large_batch_goes_in_several_messages(
    loopback, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(exchanges, "MAX_BATCH_BYTES", 1000)
    host = EchoHost()
    _, pool = await start(loopback, host)
    decodings = [Decoding(pool) for _ in range(10)]
    await asyncio.gather(*(decoding.feed(*[7] * 300) for decoding in decodings))
    assert max(host.batches) <= 4
    assert sum(host.batches) == 10
    # One that is larger than a batch goes alone.
    await Decoding(pool).feed(*[7] * 3000)


async def test_a_defect_in_reading_answers_hangs_nobody(
    loopback, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sessions, "REOPEN_FOR_S", 0.3)
    _, pool = await start(loopback, EchoHost())
    pool._outputs_of = lambda response: response.nonsense
    async with asyncio.timeout(3):
        with pytest.raises(ServiceError) as caught:
            await Decoding(pool).feed(1)
    assert caught.value.reason is Reason.SERVICE_UNAVAILABLE


async def test_a_closed_pool_opens_nothing(loopback) -> None:
    _, pool = await start(loopback, EchoHost())
    decoding = Decoding(pool)
    await decoding.feed(1)
    waiting = asyncio.create_task(decoding.feed(SILENCE))
    await asyncio.sleep(0.05)
    pool.close()
    for call in (waiting, Decoding(pool).feed(1)):
        with pytest.raises(ServiceError) as caught:
            await call
        assert caught.value.reason is Reason.DRAINING


async def test_streams_of_replicas_that_are_gone_are_not_kept(
    loopback, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(exchanges, "LOST_MEMORY_S", 0.0)
    gone, stays = await loopback.serve(EchoHost()), await loopback.serve(EchoHost())
    channel = loopback.channel(gone, stays)
    await until(lambda: channel.replicas.counts()["serving"] == 2)
    pool = pool_over(channel)
    loopback.stack.callback(pool.close)
    first, second = sorted(channel.replicas, key=lambda replica: f":{gone.port}" in replica.address)
    lost = weakref.ref(pool.stream_to(second))
    await gone.server.stop(0)
    await until(lambda: lost() is None or lost().lost)
    assert pool.stream_to(first) is not None
    await until(lambda: gc.collect() >= 0 and lost() is None)
