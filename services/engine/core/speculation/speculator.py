"""What the scheduler asks for drafts, and tells what came of them."""

from __future__ import annotations

from abc import ABC, abstractmethod

from services.engine.core.plan import StepOutputs
from services.engine.core.sequence import Sequence
from services.engine.core.speculation.acceptance import Acceptance
from services.engine.core.speculation.controller import MAX_DRAFT_TOKENS, DraftLengths
from services.engine.core.speculation.ngram import PromptLookup
from services.engine.core.speculation.step_cost import StepCost


class Speculator(ABC):
    """Guesses the next tokens of sequences that decode.

    It is asked before a step in which every planned sequence decodes: a step that prefills has
    enough to compute. What it proposes are guesses and nothing else: no answer depends on them.
    """

    def __init__(self) -> None:
        self.drafted_tokens = 0  # verified so far
        self.accepted_tokens = 0
        self._cost = StepCost()
        self._lengths = DraftLengths(self._cost.seconds)

    @abstractmethod
    def propose(self, sequences: list[Sequence], max_tokens: int) -> list[tuple[int, ...]]:
        """A draft, maybe empty, for each of `sequences`, of `max_tokens` tokens in all at most.

        The draft of a sequence leaves room for the token that is sampled after it.
        """

    @abstractmethod
    def forget(self, sequence: Sequence) -> None:
        """Drop what is kept of a sequence that has ended."""

    def may_draft(self, num_sequences: int) -> bool:
        """Whether `propose` might draft anything for so many; if not, it need not be asked."""
        return True

    def observe(self, outputs: StepOutputs) -> None:
        """Learn from a step, before its sequences take in what it brought."""
        plan = outputs.plan
        num_drafted = sum(len(sequence.draft_token_ids) for sequence in plan.sequences)
        if plan.num_tokens != len(plan.sequences) + num_drafted:
            return  # it prefilled, which costs differently
        self._cost.observe(plan.num_tokens, (outputs.ended_ns - outputs.started_ns) / 1e9)
        if num_drafted:
            self.drafted_tokens += num_drafted
            self.accepted_tokens += sum(output.num_accepted for output in outputs.outputs)


class NgramSpeculator(Speculator):
    """Drafts by prompt look-up. See `ngram`.

    Whether a guess is right shows with every token, drafted or not. So acceptance is known at any
    time at no cost, also while nothing is drafted.
    """

    def __init__(self) -> None:
        super().__init__()
        self._shared = Acceptance()
        self._states: dict[int, tuple[PromptLookup, Acceptance]] = {}

    def propose(self, sequences: list[Sequence], max_tokens: int) -> list[tuple[int, ...]]:
        """The continuation of the longest recent match of each sequence's last tokens."""
        nothing: list[tuple[int, ...]] = [()] * len(sequences)
        if not self._lengths.could_pay(len(sequences)):
            return nothing
        lookups: list[PromptLookup] = []
        survivals: list[list[float]] = []
        for sequence in sequences:
            lookup, acceptance = self._state_of(sequence)
            lookup.advance(sequence.token_ids, acceptance.observe)
            lookups.append(lookup)
            length = min(MAX_DRAFT_TOKENS, room_for_draft(sequence)) if lookup.match_length else 0
            survivals.append(acceptance.survival(lookup.match_length, length))
        if not any(survivals):
            return nothing
        lengths = self._lengths.choose(len(sequences), survivals, max_tokens)
        return [
            lookup.draft(sequence.token_ids, length) if length else ()
            for lookup, sequence, length in zip(lookups, sequences, lengths, strict=True)
        ]

    def may_draft(self, num_sequences: int) -> bool:
        """Whether a draft that is right could pay."""
        return num_sequences > 0 and self._lengths.could_pay(num_sequences)

    def forget(self, sequence: Sequence) -> None:
        """Drop the index of a sequence that has ended."""
        self._states.pop(sequence.arrival, None)

    def _state_of(self, sequence: Sequence) -> tuple[PromptLookup, Acceptance]:
        state = self._states.get(sequence.arrival)
        if state is None:
            state = (PromptLookup(), Acceptance(self._shared))
            self._states[sequence.arrival] = state
        return state


def room_for_draft(sequence: Sequence) -> int:
    """Tokens that may be drafted: with the one sampled after them they reach max_tokens at most."""
    return max(0, sequence.max_tokens - sequence.num_output_tokens - 1)
