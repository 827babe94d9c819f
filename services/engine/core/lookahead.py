"""Plans a step before the one before it has brought its tokens."""

from __future__ import annotations

from services.engine.core.block_tables import BlockTables
from services.engine.core.entrance import Entrance
from services.engine.core.plan import Plan
from services.engine.core.running_set import RunningSet


class Lookahead:
    """Guesses that all who decode go on and nobody joins them, and sees whether that came true.

    It holds in nearly every step between an arrival and an end, and there is little to gain in the
    others. All that a guess takes are free blocks, which the sequences keep and need in any case
    unless they end. So a wrong guess is dropped, and leaves nothing to be undone.
    """

    def __init__(self, running: RunningSet, entrance: Entrance, tables: BlockTables) -> None:
        self._running = running
        self._entrance = entrance
        self._tables = tables
        self._guess: Plan | None = None

    def guess(self, current: Plan) -> Plan | None:
        """The plan that is going to follow `current`, which is being computed; None if it takes
        the outputs to tell."""
        self._guess = None
        decodes = sum(sequence.num_uncomputed_tokens for sequence in current.sequences)
        if current.num_tokens == decodes == len(current.sequences) and self._is_all(current):
            tables = self._tables
            missing = [max(0, tables.missing_blocks(each, 1)) for each in current.sequences]
            if sum(missing) <= tables.pool.num_free:
                for sequence, count in zip(current.sequences, missing, strict=True):
                    if count:
                        end = sequence.num_tokens + 1
                        tables.grow(sequence, end, tables.lacking_blocks(sequence, end))
                self._guess = Plan(current.step + 1, current.sequences, current.token_counts)
        return self._guess

    def take(self) -> Plan | None:
        """The plan that was guessed, if it is what is to be done now."""
        guess, self._guess = self._guess, None
        return guess if guess is not None and self._is_all(guess) else None

    def _is_all(self, plan: Plan) -> bool:
        return not len(self._entrance) and self._running.sequences == list(plan.sequences)
