"""Steps that a device has been told to compute, and whose outputs are not there yet."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass

from services.engine.core.plan import Plan
from services.engine.core.sequence import Sequence, SequenceState


@dataclass(frozen=True, slots=True)
class _Launched:
    plan: Plan
    admissions: tuple[int, ...]  # of each sequence, when it was launched
    is_sampled: tuple[bool, ...]
    verifies: bool


class StepsUnderWay:
    """Keeps account of what launched steps compute of each sequence, until they are settled.

    They are settled in the order in which they were launched. A sequence that ends or is preempted
    meanwhile takes nothing from them any more: what it had under way is forgotten when it leaves,
    and its share of their outputs is dropped. Its blocks may be given away at once, since a device
    computes steps one after the other.
    """

    def __init__(self) -> None:
        self._steps: deque[_Launched] = deque()

    def __len__(self) -> int:
        return len(self._steps)

    @property
    def verify(self) -> bool:
        """Whether any of them verifies drafts: how many tokens it brings is not known."""
        return any(step.verifies for step in self._steps)

    def launch(self, plan: Plan) -> None:
        """Note that a plan is being computed."""
        is_sampled = []
        verifies = False
        for sequence, count in zip(plan.sequences, plan.token_counts, strict=True):
            sequence.num_launched_tokens += count
            uncomputed = sequence.num_uncomputed_tokens
            verifies |= uncomputed < 0
            sampled = uncomputed == 0
            if sampled:
                sequence.num_pending_tokens += 1
            is_sampled.append(sampled)
        admissions = tuple(sequence.admissions for sequence in plan.sequences)
        self._steps.append(_Launched(plan, admissions, tuple(is_sampled), verifies))

    def has_left(self, plan: Plan) -> bool:
        """Whether any of a launched plan's sequences is as it was."""
        step = next(each for each in self._steps if each.plan is plan)
        return any(
            sequence.state is SequenceState.RUNNING and sequence.admissions == admissions
            for sequence, admissions in zip(plan.sequences, step.admissions, strict=True)
        )

    def settle(self, plan: Plan) -> set[Sequence] | None:
        """Take the earliest plan from the account, if it is this one; returns those of its
        sequences that are as they were, to take in their outputs. None: it was never launched."""
        if not self._steps or self._steps[0].plan is not plan:
            return None
        step = self._steps.popleft()
        remaining = set()
        for sequence, count, admissions, sampled in zip(
            plan.sequences, plan.token_counts, step.admissions, step.is_sampled, strict=True
        ):
            if sequence.state is SequenceState.RUNNING and sequence.admissions == admissions:
                sequence.num_launched_tokens -= count
                sequence.num_pending_tokens -= sampled
                remaining.add(sequence)
        return remaining
