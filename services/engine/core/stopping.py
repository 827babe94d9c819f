"""When a sequence ends: end-of-sequence, stop tokens, stop sequences, length."""

from __future__ import annotations

from array import array

from services.engine.core.messages import Finish, FinishReason, Stopping


class StopChecker:
    """Decides after each sampled token whether its sequence ends.

    Stop sequences are indexed by their last token, so that a token that ends none of them costs
    one dictionary look-up however many there are.
    """

    __slots__ = ("_by_last_token", "_max_tokens", "_min_tokens", "_stop_token_ids")

    def __init__(
        self, stopping: Stopping, *, eos_token_ids: tuple[int, ...], max_tokens: int
    ) -> None:
        eos = () if stopping.ignore_eos else eos_token_ids
        self._stop_token_ids = frozenset(eos) | frozenset(stopping.stop_token_ids)
        self._max_tokens = max_tokens
        self._min_tokens = stopping.min_tokens
        self._by_last_token: dict[int, list[tuple[int, array[int]]]] = {}
        for index, stop in enumerate(stopping.stop_sequences):
            self._by_last_token.setdefault(stop[-1], []).append((index, array("q", stop)))

    def barred_token_ids(self, num_output_tokens: int) -> frozenset[int]:
        """Token ids that may not be sampled next, for the output is shorter than min_tokens."""
        return self._stop_token_ids if num_output_tokens < self._min_tokens else frozenset()

    def check(self, token_ids: array[int], num_prompt_tokens: int) -> Finish | None:
        """How the sequence ends with the last of `token_ids`, or None if it goes on.

        `token_ids` are prompt and output; a stop sequence must lie in the output alone.
        """
        num_output_tokens = len(token_ids) - num_prompt_tokens
        last = token_ids[-1]
        if num_output_tokens >= self._min_tokens:
            if last in self._stop_token_ids:
                return Finish(FinishReason.STOP, stop_token_id=last)
            for index, stop in self._by_last_token.get(last, ()):
                if len(stop) <= num_output_tokens and token_ids[-len(stop) :] == stop:
                    return Finish(FinishReason.STOP, stop_sequence_index=index)
        if num_output_tokens >= self._max_tokens:
            return Finish(FinishReason.LENGTH)
        return None
