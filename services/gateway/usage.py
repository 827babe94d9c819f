"""The tokens of a whole request."""

from __future__ import annotations

from collections.abc import Iterable

from meshserve.v1 import types_pb2
from services.gateway.context import CallContext
from services.runtime.settings import PriceSettings


def total_usage(context: CallContext) -> types_pb2.Usage:
    """Tokens over all choices so far, those of a cached answer included."""
    if context.cached_answer is not None:
        return summed(end.usage for end in context.cached_answer.ends)
    return summed(context.usages.values())


def cost(usage: types_pb2.Usage, price: PriceSettings) -> float:
    """What the tokens of an answer cost."""
    cached = min(usage.cached_prompt_tokens, usage.prompt_tokens)
    cached_price = price.prompt if price.cached_prompt is None else price.cached_prompt
    millions = (
        (usage.prompt_tokens - cached) * price.prompt
        + cached * cached_price
        + usage.completion_tokens * price.completion
    )
    return millions / 1e6


def summed(usages: Iterable[types_pb2.Usage]) -> types_pb2.Usage:
    """Tokens over choices: completions add up, the prompt they share counts once."""
    total = types_pb2.Usage()
    for usage in usages:
        total.prompt_tokens = usage.prompt_tokens
        total.cached_prompt_tokens = max(total.cached_prompt_tokens, usage.cached_prompt_tokens)
        total.completion_tokens += usage.completion_tokens
        total.reasoning_tokens += usage.reasoning_tokens
    return total
