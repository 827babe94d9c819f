"""What the scheduler asks for drafts, and tells what came of them."""

from __future__ import annotations

from abc import ABC, abstractmethod

from services.engine.core.plan import StepOutputs
from services.engine.core.sequence import Sequence
from services.engine.core.speculation.acceptance import Acceptance
from services.engine.core.speculation.controller import MAX_DRAFT_TOKENS, DraftLengths
from services.engine.core.speculation.ngram import MIN_MATCH, PromptLookup
from services.engine.core.speculation.step_cost import IdleTime, StepCost


class Speculator(ABC):
    """Guesses the next tokens of sequences that decode.

    It is asked before a step in which every planned sequence decodes: a step that prefills has
    enough to compute. What it proposes are guesses and nothing else: no answer depends on them.
    """

    def __init__(self) -> None:
        self.drafted_tokens = 0  # verified so far
        self.accepted_tokens = 0
        self._cost = StepCost()
        self._idle = IdleTime()
        self._drafting_ns = 0  # since the latest step, where that is counted for itself
        self._lengths = DraftLengths(self._cost.seconds, self._idle.seconds)

    @abstractmethod
    def propose(self, sequences: list[Sequence], max_tokens: int) -> list[tuple[int, ...]]:
        """A draft, maybe empty, for each of `sequences`, of `max_tokens` tokens in all at most.

        The draft of a sequence leaves room for the token that is sampled after it.
        """

    @abstractmethod
    def forget(self, sequence: Sequence) -> None:
        """Drop what is kept of a sequence that has ended."""

    def awaits(self, sequences: list[Sequence]) -> bool:
        """Whether the step under way is to be awaited for drafts that may follow its tokens; if
        not, the next is launched ahead without any.

        sequences: all that run.
        """
        return True

    def observe(self, outputs: StepOutputs) -> None:
        """Learn from a step, before its sequences take in what it brought."""
        plan = outputs.plan
        # There is no pause while somebody runs who ran before.
        follows = plan.sequences[0].steps > 0 if plan.sequences else False
        self._idle.observe(
            outputs.started_ns, outputs.ended_ns, follows=follows, spent_ns=self._drafting_ns
        )
        self._drafting_ns = 0
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

    def awaits(self, sequences: list[Sequence]) -> bool:
        """Whether what is followed now is likely to go on beyond the tokens under way, or a match
        to end with them, as it soon does where one thing after the other is quoted.

        One that nobody expected shows a step late, which costs a token of it.
        """
        self._idle.is_avoidable = True
        if not sequences or not self._lengths.could_pay(len(sequences)):
            return False
        if any(sequence.num_uncomputed_tokens > 1 for sequence in sequences):
            return False  # nothing is drafted beside a prefill
        survivals: list[list[float]] = []
        for sequence in sequences:
            lookup, acceptance = self._state_of(sequence)
            lookup.advance(sequence.token_ids, acceptance.observe)
            pending = sequence.num_pending_tokens
            length = min(MAX_DRAFT_TOKENS, max(0, room_for_draft(sequence) - pending))
            match_length = lookup.match_length
            if match_length:
                survivals.append(acceptance.survival(match_length, pending + length)[pending:])
            elif pending:
                begins = acceptance.probability(0)
                survival = acceptance.survival(MIN_MATCH, length)
                survivals.append([begins * each for each in survival])
        return self._lengths.are_worth_awaiting(len(sequences), survivals)

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
