"""Inputs of encoders: texts and pairs of texts with the special tokens that the model expects.

Where special tokens go, and which tokens belong to the second text, is the post-processor's rule,
which comes with the model's tokenizer.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from tokenizers import Encoding, Tokenizer

from services.tokenizer.errors import TooManyTokensError
from services.tokenizer.library import library_failures

Truncation = Literal["refuse", "drop_oldest", "drop_newest"]
_STRATEGIES = {"LongestFirst", "OnlyFirst", "OnlySecond"}


@dataclass(frozen=True, slots=True)
class EncoderInput:
    """Token ids of one input; `second_text_start` is where token ids of the second kind begin, for
    a pair that the model tells apart by token types."""

    token_ids: list[int]
    second_text_start: int | None = None


class InputEncoder:
    """Encodes for one model. May be called from many threads at once."""

    def __init__(self, backend: Tokenizer, document: Mapping[str, Any]) -> None:
        """`document` is the content of tokenizer.json, whose `truncation` says which text of a pair
        gives way."""
        self._backend = backend
        strategy = (document.get("truncation") or {}).get("strategy")
        self._strategy = strategy if strategy in _STRATEGIES else "LongestFirst"

    def texts(
        self, texts: Sequence[str], max_tokens: int | None, truncation: Truncation
    ) -> list[EncoderInput]:
        """One input for each text.

        Raises:
            InvalidTextError: a text has lone surrogates.
            TooManyTokensError: an input has more than `max_tokens`, and may not be cut.
        """
        return [
            EncoderInput(encoding.ids)
            for encoding in self._inputs([(text, None) for text in texts], max_tokens, truncation)
        ]

    def pairs(
        self, pairs: Sequence[tuple[str, str]], max_tokens: int | None, truncation: Truncation
    ) -> list[EncoderInput]:
        """One input for each pair of texts. Raises as `texts` does."""
        return [
            EncoderInput(encoding.ids, _second_kind(encoding.type_ids))
            for encoding in self._inputs(pairs, max_tokens, truncation)
        ]

    def _inputs(
        self,
        parts: Sequence[tuple[str, str | None]],
        max_tokens: int | None,
        truncation: Truncation,
    ) -> Iterator[Encoding]:
        given: list[Any] = [first if second is None else (first, second) for first, second in parts]
        with library_failures():
            encodings = self._backend.encode_batch_fast(given, add_special_tokens=True)
        for index, encoding in enumerate(encodings):
            if max_tokens is None or len(encoding) <= max_tokens:
                yield encoding
            elif truncation == "refuse":
                raise TooManyTokensError(index, len(encoding), max_tokens)
            else:
                side = "left" if truncation == "drop_oldest" else "right"
                yield self._cut(*parts[index], max_tokens, side)

    def _cut(self, first: str, second: str | None, max_tokens: int, side: str) -> Encoding:
        """An input from whose text tokens are taken until it fits."""
        backend = self._backend
        room = max(0, max_tokens - backend.num_special_tokens_to_add(second is not None))
        head = backend.encode(first, add_special_tokens=False)
        tail = None if second is None else backend.encode(second, add_special_tokens=False)
        if tail is None:
            head.truncate(room, direction=side)
        else:
            kept = kept_tokens(len(head), len(tail), room, self._strategy)
            head.truncate(kept[0], direction=side)
            tail.truncate(kept[1], direction=side)
        return backend.post_process(head, tail, True)


def kept_tokens(first: int, second: int, room: int, strategy: str) -> tuple[int, int]:
    """How many tokens of two texts with so many tokens are kept of `room`: `LongestFirst` takes
    from the longer one at each token, `OnlyFirst` and `OnlySecond` from one of them as far as there
    is something to take."""
    over = max(0, first + second - room)
    if strategy == "OnlySecond":
        from_second = min(over, second)
        return first - (over - from_second), second - from_second
    if strategy == "OnlyFirst":
        from_first = min(over, first)
        return first - from_first, second - (over - from_first)
    shorter = min(first, second, room // 2)
    if first > second:
        return min(first, room - shorter), shorter
    return shorter, min(second, room - shorter)


def _second_kind(type_ids: Sequence[int]) -> int | None:
    # Special tokens have a kind, too: the model's rule says which.
    return type_ids.index(1) if 1 in type_ids else None
