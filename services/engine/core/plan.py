"""What one step computes, and what came of it: the data between scheduler and runner."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

import msgspec

from services.engine.core.messages import TokenLogprobs
from services.engine.core.sequence import Sequence


@dataclass(frozen=True, slots=True)
class Plan:
    """One step: for each sequence, how many of its uncomputed tokens to compute.

    Prefill, a chunk of a prefill, decode and the verification of a draft differ in nothing but the
    count. A sequence whose count reaches its last known token is sampled from; the others are not.
    A count that goes beyond it takes in the first tokens of the sequence's draft, and a token is
    sampled after each of these as well.

    `block_copies` are pairs of blocks (source, destination) whose contents are copied before
    anything is computed, all as if at once: no destination is another's source.
    """

    step: int
    sequences: tuple[Sequence, ...]
    token_counts: tuple[int, ...]
    block_copies: tuple[tuple[int, int], ...] = ()

    @property
    def num_tokens(self) -> int:
        """Tokens computed in this step, over all sequences."""
        return sum(self.token_counts)

    def drafts(self) -> tuple[tuple[int, ...], ...] | None:
        """The drafted tokens computed for each sequence, or None if there are none at all."""
        if self.num_tokens == len(self.sequences):
            return None
        drafts = tuple(
            sequence.draft_token_ids[: count - known] if count > known else ()
            for sequence, count, known in zip(
                self.sequences,
                self.token_counts,
                (sequence.num_uncomputed_tokens for sequence in self.sequences),
                strict=True,
            )
        )
        return drafts if any(drafts) else None

    def of(self, sequences: Collection[Sequence]) -> Plan:
        """The same step with some of its sequences only."""
        kept = [
            (sequence, count)
            for sequence, count in zip(self.sequences, self.token_counts, strict=True)
            if sequence in sequences
        ]
        counts = tuple(count for _, count in kept)
        return Plan(self.step, tuple(each for each, _ in kept), counts, self.block_copies)

    def alone(self, index: int) -> Plan:
        """The same step with one of its sequences only, and without its draft."""
        sequence = self.sequences[index]
        count = min(self.token_counts[index], sequence.num_uncomputed_tokens)
        copies = tuple(pair for pair in self.block_copies if pair[1] in sequence.block_table)
        return Plan(self.step, (sequence,), (count,), copies)


class SequenceOutput(msgspec.Struct, frozen=True):
    """What a step brought one sequence: tokens sampled (none after a chunk of a prefill).

    With a draft there may be several, of which `num_accepted` are the draft's own: their K and V
    are in the cache. `prompt_logprobs` are those of further tokens of a prompt that is scored.
    """

    token_ids: tuple[int, ...] = ()
    logprobs: tuple[TokenLogprobs, ...] = ()
    error: Exception | None = None
    num_accepted: int = 0
    prompt_logprobs: tuple[TokenLogprobs, ...] = ()


@dataclass(frozen=True, slots=True)
class StepOutputs:
    """What came of a plan: `outputs[i]` belongs to `plan.sequences[i]`."""

    plan: Plan
    outputs: tuple[SequenceOutput, ...]
    started_ns: int
    ended_ns: int
