"""The sequences that wait for their turn, and whose turn is next."""

from __future__ import annotations

import bisect
from collections.abc import Iterator

from services.engine.core.errors import IntegrityError
from services.engine.core.fairness import TenantCounters
from services.engine.core.sequence import Sequence, SequenceState


def _arrival(sequence: Sequence) -> int:
    return sequence.arrival


def _waiting_tokens(sequence: Sequence) -> int:
    # A further choice of a request shares the prompt of the first.
    return 0 if sequence.fork_of is not None else sequence.num_tokens


class WaitingQueue:
    """Waiting sequences: by priority, then fairly between tenants, then by arrival.

    The highest priority goes first. Within it the tenant that has been served least goes first,
    and within a tenant the earliest arrival. A preempted sequence comes back with the arrival it
    always had, hence to the front of its tenant's line.
    """

    def __init__(self, counters: TenantCounters) -> None:
        self._counters = counters
        # priority -> tenant -> sequences by arrival; no line and no level is empty.
        self._levels: dict[int, dict[str, list[Sequence]]] = {}
        self._num_waiting_of: dict[str, int] = {}
        self._length = 0
        self.num_tokens = 0  # of all that wait, as far as they have to be computed

    def __len__(self) -> int:
        return self._length

    def __iter__(self) -> Iterator[Sequence]:
        return (
            sequence
            for level in self._levels.values()
            for line in level.values()
            for sequence in line
        )

    @property
    def head(self) -> Sequence | None:
        """The sequence whose turn is next, or None if nobody waits."""
        if not self._levels:
            return None
        level = self._levels[max(self._levels)]
        if len(level) == 1:
            return next(iter(level.values()))[0]
        served = self._counters.served
        return min(level.items(), key=lambda line: (served(line[0]), line[1][0].arrival))[1][0]

    def push(self, sequence: Sequence) -> None:
        """Let a sequence wait."""
        tenant = sequence.tenant
        waiting_of = self._num_waiting_of
        if tenant not in waiting_of:
            self._counters.begin_waiting(tenant, waiting_of)
        waiting_of[tenant] = waiting_of.get(tenant, 0) + 1
        level = self._levels.setdefault(sequence.priority, {})
        bisect.insort(level.setdefault(tenant, []), sequence, key=_arrival)
        self._length += 1
        self.num_tokens += _waiting_tokens(sequence)

    def remove(self, sequence: Sequence) -> None:
        """Take a sequence out wherever it stands.

        Raises:
            IntegrityError: it does not wait here.
        """
        level = self._levels.get(sequence.priority, {})
        line = level.get(sequence.tenant, [])
        index = bisect.bisect_left(line, sequence.arrival, key=_arrival)
        if index == len(line) or line[index] is not sequence:
            raise IntegrityError(f"sequence {sequence.sequence_id} is not in the waiting queue")
        del line[index]
        if not line:
            del level[sequence.tenant]
        if not level:
            del self._levels[sequence.priority]
        self._num_waiting_of[sequence.tenant] -= 1
        if not self._num_waiting_of[sequence.tenant]:
            del self._num_waiting_of[sequence.tenant]
        self._length -= 1
        self.num_tokens -= _waiting_tokens(sequence)

    def check_integrity(self) -> None:
        """Check that the queue is in order, counts right and holds only waiting sequences.

        Raises:
            IntegrityError: it does not.
        """
        waiting_of: dict[str, int] = {}
        for priority, level in self._levels.items():
            for tenant, line in level.items():
                arrivals = [sequence.arrival for sequence in line]
                if not line or arrivals != sorted(set(arrivals)):
                    raise IntegrityError("the waiting queue is out of order")
                if any((each.priority, each.tenant) != (priority, tenant) for each in line):
                    raise IntegrityError("a sequence waits in another's line")
                waiting_of[tenant] = waiting_of.get(tenant, 0) + len(line)
        if waiting_of != self._num_waiting_of or sum(waiting_of.values()) != self._length:
            raise IntegrityError("the waiting queue has lost count of its sequences")
        if sum(map(_waiting_tokens, self)) != self.num_tokens:
            raise IntegrityError("the waiting queue has lost count of its tokens")
        if any(sequence.state is not SequenceState.WAITING for sequence in self):
            raise IntegrityError("the waiting queue holds a sequence that does not wait")
