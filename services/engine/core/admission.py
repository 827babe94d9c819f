"""Which sequences may enter the engine at all."""

from __future__ import annotations

from dataclasses import dataclass

from services.engine.core.errors import InvalidSequenceError, NeverFitsError
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
