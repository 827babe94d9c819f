"""The tokens of a whole request."""

from __future__ import annotations

from collections.abc import Iterable

from meshserve.v1 import types_pb2
from services.gateway.context import RequestContext


def total_usage(context: RequestContext) -> types_pb2.Usage:
    """Tokens over all choices so far, those of a cached answer included."""
    if context.cached_answer is not None:
        return summed(end.usage for end in context.cached_answer.ends)
    return summed(context.usages.values())


def summed(usages: Iterable[types_pb2.Usage]) -> types_pb2.Usage:
    """Tokens over choices: completions add up, the prompt they share counts once."""
    total = types_pb2.Usage()
    for usage in usages:
        total.prompt_tokens = usage.prompt_tokens
        total.cached_prompt_tokens = max(total.cached_prompt_tokens, usage.cached_prompt_tokens)
        total.completion_tokens += usage.completion_tokens
        total.reasoning_tokens += usage.reasoning_tokens
    return total
