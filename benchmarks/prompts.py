"""Prompts of real English text, the same on every machine with the same Python, all different."""

from __future__ import annotations

import hashlib
import random
from functools import lru_cache
from pydoc_data import topics

from services.runtime.modelfiles import locate
from services.tokenizer.model_tokenizer import load_model_tokenizer

# What must differ between two prompts lies at their start: servers share a prefix block by block,
# and no block is shorter than this in any of those measured.
DISTINCT_START_TOKENS = 16


@lru_cache
def english_text() -> str:
    """The Python language reference, which every Python brings along under the PSF licence.

    About 110,000 tokens of prose with examples, its entries ordered by name.
    """
    return "\n\n".join(topics.topics[name] for name in sorted(topics.topics))


def text_digest() -> str:
    """Tells whether two reports used the same text."""
    return hashlib.sha256(english_text().encode()).hexdigest()[:16]


@lru_cache
def english_token_ids(model: str) -> tuple[int, ...]:
    """The whole text in the model's own tokens."""
    return tuple(load_model_tokenizer(locate(model)).encode(english_text()).token_ids)


class PromptSource:
    """Cuts prompts out of one long text, from random places, no two of which begin alike.

    Args:
        token_ids: the text in tokens.
        seed: the same seed gives the same prompts in the same order.
    """

    def __init__(self, token_ids: tuple[int, ...], seed: int) -> None:
        self._token_ids = token_ids
        self._random = random.Random(seed)
        self._starts: set[tuple[int, ...]] = set()

    def take(self, tokens: int) -> tuple[int, ...]:
        """The next prompt, of exactly `tokens` tokens.

        Raises:
            ValueError: the text is too short to give another one.
        """
        places = len(self._token_ids) - tokens + 1
        for _ in range(100):
            if places < 1:
                break
            place = self._random.randrange(places)
            prompt = self._token_ids[place : place + tokens]
            start = prompt[:DISTINCT_START_TOKENS]
            if start not in self._starts:
                self._starts.add(start)
                return prompt
        raise ValueError(
            f"{len(self._token_ids)} tokens of text do not give another prompt of {tokens}"
        )


def english_prompts(model: str, count: int, tokens: int, seed: int = 0) -> list[list[int]]:
    """`count` different prompts of exactly `tokens` tokens, as token ids."""
    source = PromptSource(english_token_ids(model), seed)
    return [list(source.take(tokens)) for _ in range(count)]
