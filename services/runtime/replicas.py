"""The replicas of a service as one of its callers knows them: where they are, how they do, whose
turn it is.

`ReplicaSet` is told three things: which addresses the service has (names.py), how each replica does
(connections.py) and what is under way there (client_calls.py and whoever holds streams). From these
it says who gets the next call. It neither waits nor connects, so that every order of events can be
tried in a test.
"""

from __future__ import annotations

import asyncio
import enum
import time
from collections.abc import Callable, Collection, Iterator, Mapping
from typing import Any, Protocol

# How long a replica that refused a call although it is healthy gets none that another can take.
PAUSE_S = 1.0


class ReplicaState(enum.Enum):
    """How a replica does, as its connection and its health service say."""

    CONNECTING = "connecting"
    """It has just been found and has not answered yet."""
    SERVING = "serving"
    """It says that it does its work."""
    NOT_SERVING = "not_serving"
    """It answers, but says that it takes no work: it starts, is unwell or drains."""
    UNREACHABLE = "unreachable"
    """There is no connection to it; another is tried every second."""


# What replicas are counted by, the best first.
STANDINGS = ("serving", "leaving", "not_serving", "connecting", "unreachable")


class Link(Protocol):
    """The connection to a replica."""

    def rpc(self, path: str, shape: str) -> Callable[..., Any]:
        """What begins a call of a method there, in bytes. `shape` is for example `unary_stream`."""
        ...

    def close(self) -> None:
        """Ends the connection, and what is under way on it."""
        ...


class Replica:
    """One address of a service. What is under way there is told by `begin` and `end`.

    Attributes:
        address: `IP:PORT`, `[IPV6]:PORT` or `unix:PATH`.
        name: the `NAME:PORT` it was found by; None for an address of the target itself.
        state: how it does.
        instance_id: tells its process from others; empty until it has answered. Who is found under
            two addresses is there twice.
        is_leaving: whether its address has left the name: it finishes what it has.
        in_flight: calls, sessions and generations of this process that are under way there.

    Invariant: `in_flight` is the number of begins without an end, and a replica is not closed while
    it is above 0, unless its whole set is.
    """

    __slots__ = (
        "_elsewhere",
        "_on_change",
        "_paused_until",
        "address",
        "in_flight",
        "instance_id",
        "is_leaving",
        "link",
        "name",
        "state",
        "turn",
    )

    link: Link

    def __init__(self, address: str, name: str | None, on_change: Callable[[], None]) -> None:
        self.address = address
        self.name = name
        self.state = ReplicaState.CONNECTING
        self.instance_id = ""
        self.is_leaving = False
        self.in_flight = 0
        # When it was chosen last, counted in choices.
        self.turn = 0
        self._elsewhere = 0
        self._paused_until = 0.0
        self._on_change = on_change

    @property
    def load(self) -> int:
        """What is under way there, for this process and for others as far as is known."""
        return self.in_flight + self._elsewhere

    @property
    def elsewhere(self) -> int:
        """What it does for other callers, as it said last."""
        return self._elsewhere

    @property
    def takes_calls(self) -> bool:
        """Whether it is meant to be given new work."""
        return self.state is ReplicaState.SERVING and not self.is_leaving

    @property
    def standing(self) -> str:
        """One of STANDINGS: its state, or `leaving` while it serves on without an address."""
        if self.state is ReplicaState.SERVING and self.is_leaving:
            return "leaving"
        return self.state.value

    def begin(self) -> None:
        """Something is under way there."""
        self.in_flight += 1

    def end(self) -> None:
        """It is over, however it went."""
        self.in_flight -= 1
        if self.is_leaving:
            self._on_change()

    def became(self, state: ReplicaState) -> None:
        """Takes note of how it does."""
        if state is not self.state:
            self.state = state
            self._on_change()

    def is_instance(self, instance_id: str) -> None:
        """Takes note of which process answers."""
        self.instance_id = instance_id

    def report(self, total: int) -> None:
        """Takes note of what it says it does for all its callers together."""
        self._elsewhere = max(0, total - self.in_flight)

    def pause(self) -> None:
        """It refused a call: for a moment others are preferred."""
        self._paused_until = time.monotonic() + PAUSE_S

    @property
    def is_paused(self) -> bool:
        """Whether it refused a call a moment ago."""
        return self._paused_until > 0 and time.monotonic() < self._paused_until


Eligible = Callable[[Replica], bool]
"""Whether a replica can take a call that not all of them can."""


class ReplicaSet:
    """All replicas of one target.

    Args:
        connect: makes the connection of a replica, and has it tell the replica how it does.

    Invariants: each address of the target has one replica that is not leaving. Another is there
    only while something is under way on it, or while it serves and none of the target's own does:
    then it is still better than nobody.
    """

    def __init__(self, connect: Callable[[Replica], Link]) -> None:
        self._connect = connect
        self._replicas: dict[str, Replica] = {}
        # Connections that another to the same address has taken the place of.
        self._replaced: list[Replica] = []
        self._turns = 0
        self._is_closed = False
        self._changed = asyncio.Event()
        # Whether it has been said who there is.
        self.is_known = False

    def __iter__(self) -> Iterator[Replica]:
        return iter([*self._replicas.values(), *self._replaced])

    def __len__(self) -> int:
        return len(self._replicas) + len(self._replaced)

    def update(self, addresses: Mapping[str, str | None]) -> None:
        """Takes note of the addresses that the target has now, each with the `NAME:PORT` it was
        found by, if any: new ones are connected to, and what is under way at others may end there.
        """
        if self._is_closed:
            return
        self.is_known = True
        for address, name in addresses.items():
            if address not in self._replicas:
                self._add(address, name)
            self._replicas[address].is_leaving = False
        for address, replica in self._replicas.items():
            replica.is_leaving = address not in addresses
        self._note_change()

    def processes(self) -> list[Replica]:
        """One replica for each process, at the better of its addresses where it has two. May be
        called from any thread."""
        best: dict[str, Replica] = {}
        for replica in self:
            known = best.setdefault(replica.instance_id or replica.address, replica)
            if STANDINGS.index(replica.standing) < STANDINGS.index(known.standing):
                best[replica.instance_id] = replica
        return list(best.values())

    def counts(self) -> dict[str, int]:
        """How many `processes` there are of each of STANDINGS."""
        standings = [replica.standing for replica in self.processes()]
        return {standing: standings.count(standing) for standing in STANDINGS}

    def renew(self) -> None:
        """Connects to everybody anew, as after a change of certificates. What is under way on the
        connections so far ends there, and so does what comes before the new ones serve."""
        if self._is_closed:
            return
        so_far, self._replicas = self._replicas, {}
        for replica in so_far.values():
            self._replaced.append(replica)
            if not replica.is_leaving:
                self._add(replica.address, replica.name)
            replica.is_leaving = True
        self._note_change()

    def pick(
        self, avoid: Collection[Replica] = (), eligible: Eligible | None = None
    ) -> Replica | None:
        """Who gets the next call: of those that serve the one with the least under way, and of
        equals the one that has waited longest. None if nobody can take it.

        Those in `avoid` have been tried: they come last. One that connects is better than them, and
        a call to it waits for that. Who is not `eligible` gets none.
        """
        if len(self._replicas) == 1 and not self._replaced and eligible is None:
            (only,) = self._replicas.values()
            return only if _preference(only, avoid) < _NOBODY else None
        best: Replica | None = None
        best_rank = (_NOBODY, 0, 0)
        for replica in self:
            if eligible is not None and not eligible(replica):
                continue
            rank = (_preference(replica, avoid), replica.load, replica.turn)
            if rank < best_rank:
                best, best_rank = replica, rank
        if best is not None:
            self._turns += 1
            best.turn = self._turns
        return best

    def has_other(self, avoid: Collection[Replica], eligible: Eligible | None = None) -> bool:
        """Whether one serves that is not in `avoid`, and is `eligible`."""
        return any(
            replica.state is ReplicaState.SERVING
            and replica not in avoid
            and (eligible is None or eligible(replica))
            for replica in self
        )

    async def wait_for_other(
        self, avoid: Collection[Replica], timeout_s: float, eligible: Eligible | None = None
    ) -> None:
        """Returns once `has_other`, or after a time."""
        await self._wait(lambda: self.has_other(avoid, eligible), timeout_s)

    async def wait_until_known(self, timeout_s: float) -> None:
        """Returns once `is_known`, or after a time."""
        await self._wait(lambda: self.is_known, timeout_s)

    def close(self) -> None:
        """Ends all connections, and what is under way on them; nobody can be picked any more."""
        self._is_closed = True
        for replica in self:
            replica.link.close()
        self._replicas.clear()
        self._replaced.clear()

    def _add(self, address: str, name: str | None) -> None:
        replica = Replica(address, name, self._note_change)
        self._replicas[address] = replica
        replica.link = self._connect(replica)

    async def _wait(self, condition: Callable[[], bool], timeout_s: float) -> None:
        try:
            async with asyncio.timeout(timeout_s):
                while not condition():
                    await self._changed.wait()
        except TimeoutError:
            return

    def _note_change(self) -> None:
        is_served = any(replica.takes_calls for replica in self)
        for replica in self:
            is_needed = replica.state is ReplicaState.SERVING and not is_served
            if replica.is_leaving and not replica.in_flight and not is_needed:
                if replica in self._replaced:
                    self._replaced.remove(replica)
                else:
                    del self._replicas[replica.address]
                replica.link.close()
        # Those who wait do so for the event of the state they have seen.
        self._changed.set()
        self._changed = asyncio.Event()


_NOBODY = 6


def _preference(replica: Replica, avoid: Collection[Replica]) -> int:
    """0 is best; _NOBODY is not to be called at all."""
    if replica.state is ReplicaState.SERVING:
        if replica in avoid:
            return 5
        if replica.is_leaving:
            return 3 if replica.is_paused else 2
        return 1 if replica.is_paused else 0
    if replica.state is ReplicaState.CONNECTING and not replica.is_leaving:
        return 5 if replica in avoid else 4
    return _NOBODY
