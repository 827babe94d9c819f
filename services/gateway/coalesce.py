"""Fewer, larger messages for callers that ask for them."""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator
from contextlib import aclosing

from meshserve.v1 import types_pb2
from services.gateway.events import Event, TextDelta


async def at_intervals(events: AsyncGenerator[Event], interval_s: float) -> AsyncGenerator[Event]:
    """Joins text that comes within `interval_s` of the last text sent for the same choice.

    The first text and the end of a choice never wait.
    """
    sent_at: dict[int, float] = {}
    held: dict[int, TextDelta] = {}
    async with aclosing(events):
        async for event in events:
            if isinstance(event, TextDelta):
                delta = _joined(held.pop(event.index, None), event)
                now = time.monotonic()
                if now - sent_at.get(event.index, -interval_s) < interval_s:
                    held[event.index] = delta
                    continue
                sent_at[event.index] = now
                yield delta
            else:
                rest = held.pop(event.index, None)
                if rest is not None:
                    yield rest
                yield event


def _joined(first: TextDelta | None, second: TextDelta) -> TextDelta:
    if first is None:
        return second
    logprobs = first.logprobs
    if second.logprobs is not None:
        logprobs = types_pb2.Logprobs()
        if first.logprobs is not None:
            logprobs.MergeFrom(first.logprobs)
        logprobs.MergeFrom(second.logprobs)
    return TextDelta(
        second.index, first.text + second.text, first.token_ids + second.token_ids, logprobs
    )
