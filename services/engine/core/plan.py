"""What one step computes, and what came of it: the data between scheduler and runner."""

from __future__ import annotations

from dataclasses import dataclass

from services.engine.core.messages import Finish, TokenLogprobs
from services.engine.core.sequence import Sequence


@dataclass(frozen=True, slots=True)
class Plan:
    """One step: for each sequence, how many of its uncomputed tokens to compute.

    Prefill, a chunk of a prefill and decode differ in nothing but the count. A sequence whose
    count reaches its last known token is sampled from; the others are not.
    """

    step: int
    sequences: tuple[Sequence, ...]
    token_counts: tuple[int, ...]

    @property
    def num_tokens(self) -> int:
        """Tokens computed in this step, over all sequences."""
        return sum(self.token_counts)

    def alone(self, index: int) -> Plan:
        """The same step with one of its sequences only."""
        return Plan(self.step, (self.sequences[index],), (self.token_counts[index],))


@dataclass(frozen=True, slots=True)
class SequenceOutput:
    """What a step brought one sequence: tokens sampled (none after a chunk of a prefill)."""

    token_ids: tuple[int, ...] = ()
    logprobs: tuple[TokenLogprobs, ...] = ()
    error: Exception | None = None


@dataclass(frozen=True, slots=True)
class StepOutputs:
    """What came of a plan: `outputs[i]` belongs to `plan.sequences[i]`."""

    plan: Plan
    outputs: tuple[SequenceOutput, ...]
    started_ns: int
    ended_ns: int


@dataclass(frozen=True, slots=True)
class SequenceUpdate:
    """What a step changed for one sequence, for whoever listens to it."""

    sequence: Sequence
    token_ids: tuple[int, ...] = ()
    logprobs: tuple[TokenLogprobs, ...] = ()
    finish: Finish | None = None
