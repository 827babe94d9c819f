"""Which sequences are accepted at all, and how many may run."""

from __future__ import annotations

from dataclasses import dataclass

from services.engine.core.errors import InvalidSequenceError, NeverFitsError, QueueFullError
from services.engine.core.messages import SequenceRequest


@dataclass(frozen=True, slots=True)
class AdmissionLimits:
    """What a single sequence may ask for.

    `max_context_tokens` counts prompt and output together: the model's context, or what the whole
    block pool holds if that is less.
    """

    max_context_tokens: int
    vocab_size: int

    def max_output_tokens(self, request: SequenceRequest) -> int:
        """How many tokens the sequence may produce: what it asks for, or what the context leaves.

        Raises:
            InvalidSequenceError: the prompt is empty, a token id is not in the vocabulary, a stop
                sequence is empty, or max_tokens < 1.
            NeverFitsError: prompt and max_tokens exceed the context.
        """
        prompt = request.prompt_token_ids
        stopping = request.stopping
        if not prompt:
            raise InvalidSequenceError("the prompt is empty")
        if min(prompt) < 0 or max(prompt) >= self.vocab_size:
            raise InvalidSequenceError(
                f"the prompt holds a token id outside the vocabulary [0, {self.vocab_size})"
            )
        if any(not stop for stop in stopping.stop_sequences):
            raise InvalidSequenceError("a stop sequence is empty")
        room = self.max_context_tokens - len(prompt)
        wanted = 1 if stopping.max_tokens is None else stopping.max_tokens
        if wanted < 1:
            raise InvalidSequenceError(f"max_tokens must be at least 1, not {wanted}")
        if wanted > room:
            raise NeverFitsError(
                f"a prompt of {len(prompt)} tokens and {wanted} completion tokens exceed the "
                f"context of {self.max_context_tokens} tokens"
            )
        return room if stopping.max_tokens is None else wanted


@dataclass(frozen=True, slots=True)
class QueueLimits:
    """How much may wait. Beyond it newcomers are refused at once: whoever would wait too long
    learns it now and can go elsewhere."""

    max_sequences: int
    max_tokens: int

    def check(self, waiting: tuple[int, int], new: tuple[int, int]) -> None:
        """Check that newcomers, given as (sequences, tokens), may wait beside those who do.

        A request of more than `max_tokens` is accepted where nobody waits, else it never would be.

        Raises:
            QueueFullError: they may not.
        """
        (waiting_sequences, waiting_tokens), (new_sequences, new_tokens) = waiting, new
        if waiting_sequences + new_sequences > self.max_sequences:
            raise QueueFullError(
                f"{waiting_sequences} sequences wait already, of at most {self.max_sequences}"
            )
        if waiting_tokens and waiting_tokens + new_tokens > self.max_tokens:
            raise QueueFullError(
                f"sequences of {waiting_tokens} tokens wait already, of at most "
                f"{self.max_tokens}, and {new_tokens} more do not fit"
            )


# Steps without a preemption after which one more sequence may run.
_CALM_STEPS = 32


class ConcurrencyLimit:
    """How many sequences may run: fewer after each preemption, one more after each calm while.

    A preemption says that those who run do not all fit. Letting the next one in at once would push
    out another, and the engine would compute the same tokens over and over. So as many may run as
    were left, and the limit grows again slowly; additive increase, multiplicative decrease, except
    that how far to decrease need not be guessed.
    """

    def __init__(self, max_running_sequences: int) -> None:
        self.limit = max_running_sequences
        self._max = max_running_sequences
        self._calm_steps = 0

    def preempted(self, num_running: int) -> None:
        """Note a preemption for want of blocks that left `num_running` sequences."""
        self.limit = max(1, min(self.limit, num_running))
        self._calm_steps = 0

    def stepped(self) -> None:
        """Note a step."""
        if self.limit == self._max:
            return
        self._calm_steps += 1
        if self._calm_steps == _CALM_STEPS:
            self.limit += 1
            self._calm_steps = 0
