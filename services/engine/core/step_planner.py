"""Decides which sequences compute how many tokens in a step, and who gives up room for it."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeAlias

from services.engine.core.admission import ConcurrencyLimit
from services.engine.core.block_tables import BlockTables
from services.engine.core.clock import now_ns
from services.engine.core.entrance import Entrance
from services.engine.core.preemption import choose_victim
from services.engine.core.running_set import RunningSet
from services.engine.core.sequence import Sequence, SequenceState
from services.engine.core.token_budget import TokenBudget, share

# How many tokens of each sequence are computed, and the blocks (source, destination) to be copied
# before.
Planned: TypeAlias = tuple[dict[Sequence, int], list[tuple[int, int]]]


class StepPlanner:
    """Plans steps; iteration-level scheduling as in Orca (OSDI '22).

    The order of a step:
      1. every decoding sequence gets its token; where the pool is full, a running sequence is
         preempted (`preemption` says which) and gives all its blocks back;
      2. waiting sequences enter as long as rows and blocks last (`entrance` says who);
      3. all prefills under way share what the token budget leaves (`token_budget` says how).

    A sequence enters only when all tokens it has now fit, so a prefill never waits for blocks;
    where layers have windows, as much of these tokens as they see at a time.

    Postcondition of every plan: the block table of each planned sequence holds all tokens it will
    have after the step.
    """

    def __init__(
        self,
        running: RunningSet,
        entrance: Entrance,
        tables: BlockTables,
        budget: TokenBudget,
        concurrency: ConcurrencyLimit,
    ) -> None:
        self.preemptions = 0
        self._running = running
        self._entrance = entrance
        self._tables = tables
        self._pool = tables.pool
        self._budget = budget
        self._concurrency = concurrency

    def plan(self) -> Planned:
        """The next step. It is empty only if there is nothing to compute."""
        planned: dict[Sequence, int] = {}
        self._plan_decodes(planned, preempt=True)

        def preempt(victim: Sequence) -> None:
            self._preempt(victim, planned)

        copies = self._admit(planned, preempt)
        self._plan_prefills(planned)
        return planned, copies

    def plan_ahead(self) -> Planned | None:
        """The step to follow those under way, as far as it can be told before their outputs come.

        None: there is nothing to be told, or it takes these, to find somebody who gives up room.
        """
        if self._entrance.wants_room:
            self._entrance.wants_room = False
            return None
        if self._tables.shape.slidings and (
            len(self._entrance) or any(each.num_uncomputed_tokens > 1 for each in self._running)
        ):
            # What slides out of the windows of a prefill is known once it is computed.
            return None
        planned: dict[Sequence, int] = {}
        if not self._plan_decodes(planned, preempt=False):
            return None
        copies = self._admit(planned, None)
        self._plan_prefills(planned)
        return (planned, copies) if planned else None

    def _admit(
        self, planned: dict[Sequence, int], preempt: Callable[[Sequence], None] | None
    ) -> list[tuple[int, int]]:
        entered, copies = self._entrance.admit(preempt)
        if self._tables.store is not None:
            self._tables.store.join()
        # Where all but the last token was found, what is left is a decode.
        planned.update((each, 1) for each in entered if each.num_uncomputed_tokens == 1)
        return copies

    def _plan_decodes(self, planned: dict[Sequence, int], *, preempt: bool) -> bool:
        """Plan a token for each sequence that decodes; False: somebody would have to go for it."""
        for sequence in tuple(self._running):
            # A sequence further up may have preempted this one.
            if sequence.state is not SequenceState.RUNNING or sequence.num_uncomputed_tokens != 1:
                continue
            if sequence.num_pending_tokens and sequence.is_complete:
                continue
            if self._tables.missing_blocks(sequence, 0) > 0:
                end = sequence.num_expected_tokens
                lacking = self._tables.lacking_blocks(sequence, end)
                if lacking > self._pool.num_free and not preempt:
                    return False
                if not self._grow(sequence, end, lacking, planned):
                    continue
            planned[sequence] = 1
        return True

    def _grow(
        self, sequence: Sequence, end: int, lacking: int, planned: dict[Sequence, int]
    ) -> bool:
        """Let the block table of a running sequence reach `end` tokens, for which it lacks so many
        blocks and others may have to go; False: it had to."""
        while lacking > self._pool.num_free:
            victim = choose_victim(
                self._running.sequences, self._pool, self._tables.shape.num_groups
            )
            self._preempt(victim, planned)
            self._concurrency.preempted(len(self._running))
            if victim is sequence:
                return False
        self._tables.grow(sequence, end, lacking)
        return True

    def _plan_prefills(self, planned: dict[Sequence, int]) -> None:
        if len(planned) == len(self._running):
            return
        prefills = [
            sequence
            for sequence in self._running
            if sequence not in planned and not sequence.is_complete
        ]
        shares = share(self._budget.prefill_tokens(sum(planned.values())), prefills)
        planned.update(shares)
        if self._tables.shape.slidings:
            for sequence, count in shares.items():
                if sequence.state is SequenceState.RUNNING:
                    end = sequence.num_computed_tokens + count
                    lacking = self._tables.lacking_blocks(sequence, end)
                    self._grow(sequence, end, lacking, planned)

    def _preempt(self, sequence: Sequence, planned: dict[Sequence, int]) -> None:
        planned.pop(sequence, None)
        self._tables.save(sequence)
        self._running.leave(sequence)
        self._entrance.end_prefill(sequence)
        sequence.interrupt(now_ns())
        sequence.state = SequenceState.WAITING
        self._entrance.push(sequence)
        self.preemptions += 1
