"""Who gets the next call, whatever has happened before: names change, replicas fail, calls end."""

from __future__ import annotations

import asyncio
import time
from typing import Any

import pytest
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, invariant, rule

from services.runtime.replicas import Replica, ReplicaSet, ReplicaState

ADDRESSES = [f"10.0.0.{number}:1" for number in range(1, 6)]


class FakeLink:
    """A connection that says nothing by itself."""

    def __init__(self, replica: Replica) -> None:
        self.replica = replica
        self.is_closed = False

    def rpc(self, path: str, shape: str) -> Any:
        raise NotImplementedError

    def close(self) -> None:
        assert not self.is_closed
        self.is_closed = True


def set_of(*states: ReplicaState) -> tuple[ReplicaSet, list[Replica]]:
    replicas = ReplicaSet(FakeLink)
    replicas.update(dict.fromkeys(ADDRESSES[: len(states)]))
    members = list(replicas)
    for replica, state in zip(members, states, strict=True):
        replica.became(state)
    return replicas, members


UP, DOWN = ReplicaState.SERVING, ReplicaState.UNREACHABLE
NOT_SERVING, CONNECTING = ReplicaState.NOT_SERVING, ReplicaState.CONNECTING


def test_equals_take_turns() -> None:
    replicas, (a, b, c) = set_of(UP, UP, UP)
    assert [replicas.pick() for _ in range(6)] == [a, b, c, a, b, c]


def test_the_one_with_the_least_under_way_is_next() -> None:
    replicas, (a, b) = set_of(UP, UP)
    a.begin()
    a.begin()
    b.begin()
    assert [replicas.pick() for _ in range(2)] == [b, b]
    a.end()
    a.end()
    assert replicas.pick() is a


def test_what_a_replica_does_for_others_counts() -> None:
    replicas, (a, b) = set_of(UP, UP)
    a.begin()
    b.report(3)
    assert replicas.pick() is a
    # Of the four two are ours.
    b.begin()
    b.begin()
    b.report(4)
    assert (b.elsewhere, b.load) == (2, 4)
    b.report(0)
    assert b.load == 2


@pytest.mark.parametrize("state", [DOWN, NOT_SERVING])
def test_who_takes_nothing_is_passed_over(state: ReplicaState) -> None:
    replicas, (_, up) = set_of(state, UP)
    assert {replicas.pick() for _ in range(4)} == {up}
    replicas, _ = set_of(state, state)
    assert replicas.pick() is None


def test_one_that_connects_is_waited_for_only_where_nobody_serves() -> None:
    replicas, (connecting, up) = set_of(CONNECTING, UP)
    assert {replicas.pick() for _ in range(4)} == {up}
    up.became(DOWN)
    assert replicas.pick() is connecting


def test_who_has_been_tried_comes_last() -> None:
    replicas, (tried, other) = set_of(UP, UP)
    other.begin()
    assert replicas.pick([tried]) is other
    other.became(DOWN)
    assert replicas.pick([tried]) is tried


def test_who_has_refused_comes_after_the_others_for_a_moment(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    now = 100.0
    monkeypatch.setattr(time, "monotonic", lambda: now)
    replicas, (refused, other) = set_of(UP, UP)
    refused.pause()
    assert {replicas.pick() for _ in range(4)} == {other}
    other.became(DOWN)
    assert replicas.pick() is refused, "better than nobody"
    other.became(UP)
    now += 1.01
    assert {replicas.pick() for _ in range(4)} == {refused, other}


@pytest.mark.parametrize("state", [DOWN, NOT_SERVING])
def test_the_only_one_is_passed_over_too_where_it_takes_nothing(state: ReplicaState) -> None:
    replicas, (only,) = set_of(state)
    assert replicas.pick() is None
    only.became(UP)
    assert replicas.pick() is only
    assert replicas.pick([only]) is only, "better than nobody"


def test_of_those_that_connect_the_one_that_has_not_been_tried_is_waited_for() -> None:
    replicas, (tried, other) = set_of(CONNECTING, CONNECTING)
    assert {replicas.pick([tried]) for _ in range(4)} == {other}


def test_of_those_that_leave_the_one_that_has_not_refused_comes_first() -> None:
    replicas, (refused, other) = set_of(UP, UP)
    replicas.update({})
    refused.pause()
    assert {replicas.pick() for _ in range(4)} == {other}


def test_a_set_that_is_closed_connects_to_nobody() -> None:
    replicas, (one,) = set_of(UP)
    replicas.close()
    assert one.link.is_closed
    replicas.update({ADDRESSES[3]: None})
    assert replicas.pick() is None
    assert not list(replicas)


def test_one_that_left_finishes_what_it_has_and_is_forgotten() -> None:
    replicas, (leaving, other) = set_of(UP, UP)
    leaving.begin()
    replicas.update({other.address: None})
    assert {replicas.pick() for _ in range(4)} == {other}
    assert list(replicas) == [leaving, other]
    leaving.end()
    assert list(replicas) == [other]
    assert leaving.link.is_closed


def test_one_that_comes_back_before_it_is_forgotten_goes_on() -> None:
    replicas, (leaving, other) = set_of(UP, UP)
    leaving.begin()
    replicas.update({other.address: None})
    replicas.update({other.address: None, leaving.address: None})
    leaving.end()
    assert set(replicas) == {leaving, other}
    assert {replicas.pick() for _ in range(4)} == {leaving, other}


def test_the_last_that_serve_are_kept_until_others_do() -> None:
    replicas, (old,) = set_of(UP)
    replicas.update({})
    assert replicas.pick() is old, "a name that has lost its addresses may get them back"
    replicas.update({ADDRESSES[3]: None})
    assert replicas.pick() is old, "the new one does not serve yet"
    (new,) = (replica for replica in replicas if replica is not old)
    new.became(UP)
    assert list(replicas) == [new]


def test_a_connection_serves_until_the_one_that_takes_its_place_does() -> None:
    replicas, (old,) = set_of(UP)
    old.begin()
    replicas.renew()
    assert replicas.pick() is old
    (new,) = (replica for replica in replicas if replica is not old)
    assert (new.address, new.name) == (old.address, old.name)
    new.became(UP)
    assert {replicas.pick() for _ in range(4)} == {new}
    old.end()
    assert list(replicas) == [new]
    assert old.link.is_closed


async def test_who_waits_for_a_replica_goes_on_when_one_serves() -> None:
    replicas, (tried, other) = set_of(UP, DOWN)
    waiting = asyncio.create_task(replicas.wait_for_other([tried], 5))
    await asyncio.sleep(0)
    tried.became(DOWN)
    await asyncio.sleep(0)
    assert not waiting.done()
    other.became(UP)
    await asyncio.wait_for(waiting, 1)
    await replicas.wait_for_other([other], 0.01)


def counted(replicas: ReplicaSet) -> dict[str, int]:
    return {standing: number for standing, number in replicas.counts().items() if number}


def test_replicas_are_counted_by_what_they_are_to_their_caller() -> None:
    replicas, members = set_of(UP, UP, NOT_SERVING, DOWN, CONNECTING)
    assert counted(replicas) == {
        "serving": 2,
        "not_serving": 1,
        "unreachable": 1,
        "connecting": 1,
    }
    members[0].begin()
    replicas.update(dict.fromkeys(ADDRESSES[1:]))
    assert counted(replicas)["leaving"] == counted(replicas)["serving"] == 1
    assert list(ReplicaSet(FakeLink).counts().values()) == [0] * 5


def test_a_replica_with_two_addresses_is_counted_once_as_the_better_of_them() -> None:
    replicas, (v4, v6, other) = set_of(UP, UP, UP)
    v4.is_instance("a")
    v6.is_instance("a")
    other.is_instance("b")
    assert counted(replicas) == {"serving": 2}
    assert replicas.processes() == [v4, other]
    v6.became(DOWN)
    assert counted(replicas) == {"serving": 2}
    v6.became(UP)
    v4.became(DOWN)
    assert counted(replicas) == {"serving": 2}
    assert replicas.processes() == [v6, other]
    v6.became(DOWN)
    v4.became(UP)
    v4.became(DOWN)
    assert counted(replicas) == {"serving": 1, "unreachable": 1}
    # The process at one of the addresses is another one now.
    v4.is_instance("c")
    v4.became(UP)
    assert counted(replicas) == {"serving": 2, "unreachable": 1}


class Changes(RuleBasedStateMachine):
    """Any order of what can happen to a set of replicas."""

    def __init__(self) -> None:
        super().__init__()
        self.replicas = ReplicaSet(self.connect)
        self.links: list[FakeLink] = []
        self.listed: set[str] = set()
        self.under_way: dict[Replica, int] = {}

    calls = Bundle("calls")

    def connect(self, replica: Replica) -> FakeLink:
        link = FakeLink(replica)
        self.links.append(link)
        return link

    @rule(addresses=st.sets(st.sampled_from(ADDRESSES)))
    def the_name_changes(self, addresses: set[str]) -> None:
        self.listed = addresses
        self.replicas.update(dict.fromkeys(addresses))

    @rule()
    def certificates_change(self) -> None:
        before = set(self.replicas)
        self.replicas.renew()
        assert not [
            replica for replica in self.replicas if replica in before and replica.takes_calls
        ]

    @rule(number=st.integers(0, 9), state=st.sampled_from([UP, UP, DOWN, NOT_SERVING]))
    def a_replica_changes(self, number: int, state: ReplicaState) -> None:
        members = list(self.replicas)
        if members:
            members[number % len(members)].became(state)

    @rule(number=st.integers(0, 9), total=st.integers(0, 9))
    def a_replica_reports(self, number: int, total: int) -> None:
        members = list(self.replicas)
        if members:
            members[number % len(members)].report(total)

    @rule(target=calls)
    def a_call_begins(self) -> Replica | None:
        serving = [replica for replica in self.replicas if replica.takes_calls]
        replica = self.replicas.pick()
        if serving:
            assert replica in serving
            assert replica.load == min(each.load for each in serving)
        elif replica is None:
            assert not any(each.state is UP for each in self.replicas)
        if replica is not None:
            assert not replica.link.is_closed
            replica.begin()
            self.under_way[replica] = self.under_way.get(replica, 0) + 1
        return replica

    @rule(replica=consumes(calls))
    def a_call_ends(self, replica: Replica | None) -> None:
        if replica is not None:
            self.under_way[replica] -= 1
            replica.end()

    @invariant()
    def every_address_has_one_replica_that_stays(self) -> None:
        staying = [replica.address for replica in self.replicas if not replica.is_leaving]
        assert sorted(staying) == sorted(self.listed)
        assert len(self.replicas) == len(list(self.replicas))

    @invariant()
    def what_has_left_is_there_only_while_it_is_needed(self) -> None:
        is_served = any(replica.takes_calls for replica in self.replicas)
        for replica in self.replicas:
            if replica.is_leaving:
                assert replica.in_flight or (replica.state is UP and not is_served)

    @invariant()
    def connections_are_closed_with_their_replicas_and_not_before_their_calls_end(self) -> None:
        members = set(self.replicas)
        for link in self.links:
            assert link.is_closed == (link.replica not in members)
            if link.is_closed:
                assert not self.under_way.get(link.replica)

    @invariant()
    def what_is_under_way_is_counted(self) -> None:
        for replica in self.replicas:
            assert replica.in_flight == self.under_way.get(replica, 0)


TestChanges = Changes.TestCase
