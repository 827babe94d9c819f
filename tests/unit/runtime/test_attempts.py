"""Whether and when a call is tried again."""

from __future__ import annotations

import asyncio

import pytest

from services.runtime import attempts
from services.runtime.attempts import Attempts
from services.runtime.errors import Reason, ServiceError
from services.runtime.replicas import ReplicaSet, ReplicaState
from tests.unit.runtime.test_replicas import FakeLink, set_of

AWAY = ServiceError(Reason.SERVICE_UNAVAILABLE, "away")


async def test_a_call_to_one_replica_is_not_tried_again() -> None:
    replicas, (only, _) = set_of(ReplicaState.NOT_SERVING, ReplicaState.SERVING)
    tries = Attempts(replicas, "engine", None, only=only)
    assert tries.pick() is only
    assert not await tries.may_go_on(AWAY, only)


async def test_what_has_been_tried_is_not_tried_next() -> None:
    replicas, members = set_of(ReplicaState.SERVING, ReplicaState.SERVING, ReplicaState.SERVING)
    tries = Attempts(replicas, "engine", None)
    tried = []
    for _ in members:
        tried.append(tries.pick())
        assert await tries.may_go_on(AWAY, tried[-1])
    assert set(tried) == set(members)


def test_a_deadline_that_has_passed_ends_a_call() -> None:
    replicas, _ = set_of(ReplicaState.SERVING)
    tries = Attempts(replicas, "engine", -1.0)
    with pytest.raises(ServiceError) as caught:
        tries.remaining_s()
    assert caught.value.reason is Reason.DEADLINE_EXCEEDED
    assert Attempts(replicas, "engine", None).remaining_s() is None


@pytest.mark.parametrize("is_known", [True, False])
async def test_no_pause_goes_beyond_the_deadline(
    monkeypatch: pytest.MonkeyPatch, is_known: bool
) -> None:
    monkeypatch.setattr(attempts, "FIRST_DELAY_S", 300.0)
    monkeypatch.setattr(attempts, "LONGEST_DELAY_S", 300.0)
    monkeypatch.setattr(attempts, "LOOK_UP_WAIT_S", 300.0)
    replicas = ReplicaSet(FakeLink)
    if is_known:
        replicas.update({})
    tries = Attempts(replicas, "engine", 0.05)
    async with asyncio.timeout(30):
        await tries.may_go_on(AWAY, None)
    with pytest.raises(ServiceError) as caught:
        tries.remaining_s()
    assert caught.value.reason is Reason.DEADLINE_EXCEEDED
