"""Where sequences wait, and how they come to run."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from services.engine.core.admission import ConcurrencyLimit
from services.engine.core.block_tables import BlockTables
from services.engine.core.fairness import TenantCounters
from services.engine.core.preemption import victims_for
from services.engine.core.prefill_sharing import PrefillSharing
from services.engine.core.prefix_cache import Match
from services.engine.core.running_set import RunningSet
from services.engine.core.sequence import Sequence
from services.engine.core.waiting_queue import WaitingQueue


class Entrance:
    """Lets waiting sequences enter the running set, in the order of the queue.

    Nobody overtakes the head of the queue; but who waits for a prefill under way, to share it,
    waits beside the queue. Where the head lacks room, it takes that of running sequences of lower
    priority, if that is enough.
    """

    def __init__(
        self,
        tables: BlockTables,
        running: RunningSet,
        tenants: TenantCounters,
        concurrency: ConcurrencyLimit,
    ) -> None:
        self._pool = tables.pool
        self._tables = tables
        self._running = running
        self._tenants = tenants
        self._concurrency = concurrency
        self._queue = WaitingQueue(tenants)
        self._sharing = PrefillSharing(tables.prefix_cache, tables.pool.block_size)
        self._compiling: dict[Sequence, None] = {}  # in the order they came
        self.wants_room = False  # whether the head could have entered if somebody had gone

    def __len__(self) -> int:
        return len(self._queue) + len(self._sharing) + len(self._compiling)

    def __iter__(self) -> Iterator[Sequence]:
        yield from self._queue
        yield from self._sharing
        yield from self._compiling

    @property
    def num_compiling(self) -> int:
        """Those whose rules are being compiled, and who stand in no queue yet."""
        return len(self._compiling)

    @property
    def compiled(self) -> Iterator[Sequence]:
        """Of these, those whose rules are compiled or cannot be."""
        return (each for each in self._compiling if each.compilation and each.compilation.done)

    @property
    def num_tokens(self) -> int:
        """Tokens to compute of those in the queue."""
        return self._queue.num_tokens

    def push(self, sequence: Sequence) -> None:
        """Let a sequence wait, for its rule first where that is not compiled."""
        if sequence.compilation is not None and sequence.matcher is None:
            self._compiling[sequence] = None
        else:
            self._queue.push(sequence)

    def begin_waiting(self, sequence: Sequence) -> None:
        """Queue a sequence whose rule has been compiled."""
        del self._compiling[sequence]
        assert sequence.compilation is not None
        assert sequence.compilation.grammar is not None
        sequence.matcher = sequence.compilation.grammar.matcher(
            ends_by_token=not sequence.request.stopping.ignore_eos
        )
        self._queue.push(sequence)

    def remove(self, sequence: Sequence) -> None:
        """Take out a sequence that waits."""
        if sequence in self._compiling:
            del self._compiling[sequence]
        elif sequence.awaits is not None:
            self._sharing.remove(sequence)
        else:
            self._queue.remove(sequence)

    def end_prefill(self, sequence: Sequence) -> None:
        """Note that a sequence has got its first token, or runs no longer."""
        if sequence in self._sharing:
            for follower in self._sharing.finish(sequence):
                self._queue.push(follower)

    def admit(
        self, preempt: Callable[[Sequence], None] | None
    ) -> tuple[list[Sequence], list[tuple[int, int]]]:
        """Let enter who can; `preempt` puts a running sequence back into the queue. Without it
        nobody goes, and `wants_room` says whether somebody would have had to.

        Returns who entered, and the blocks (source, destination) to copy for them.
        """
        entered: list[Sequence] = []
        copies: list[tuple[int, int]] = []
        self.wants_room = False
        while (sequence := self._queue.head) is not None:
            match = self._tables.match(sequence)
            leader = self._sharing.leader_for(sequence, match)
            if leader is not None:
                self._queue.remove(sequence)
                self._sharing.wait(sequence, leader)
                continue
            missing_rows = len(self._running) + 1 - self._concurrency.limit
            usable = self._usable(sequence, match) if missing_rows <= 0 else None
            if usable is None:
                usable = self._tables.match_whole_blocks(sequence, match)
                victims = self._victims(sequence, usable, missing_rows)
                self.wants_room = preempt is None and bool(victims)
                if not victims or preempt is None:
                    break
                for victim in victims:
                    preempt(victim)
            self._queue.remove(sequence)
            self._tenants.enter(sequence.tenant)
            copies += self._running.enter(sequence, usable)
            sequence.fork_of = None
            entered.append(sequence)
            if sequence.num_uncomputed_tokens > 1:
                self._sharing.lead(sequence)
        return entered, copies

    def check_integrity(self) -> None:
        """Check the queue and those who wait beside it.

        Raises:
            IntegrityError: something does not hold.
        """
        self._queue.check_integrity()
        self._sharing.check_integrity()

    def _usable(self, sequence: Sequence, match: Match) -> Match | None:
        """As much of `match` as there is room to enter with; None if there is none."""
        if self._running.missing_blocks(sequence, match) <= 0:
            return match
        # Without a copy, whose source is held beside it for a step, fewer blocks are needed.
        whole = self._tables.match_whole_blocks(sequence, match)
        return whole if self._running.missing_blocks(sequence, whole) <= 0 else None

    def _victims(self, sequence: Sequence, match: Match, missing_rows: int) -> list[Sequence]:
        return victims_for(
            sequence,
            self._running.sequences,
            self._pool,
            num_blocks=self._running.missing_blocks(sequence, match),
            num_rows=missing_rows,
            kept_blocks=frozenset(match.blocks),
            num_groups=self._tables.shape.num_groups,
        )
