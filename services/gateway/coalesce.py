"""Fewer, larger messages for callers that ask for them."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator
from contextlib import aclosing, suppress
from dataclasses import dataclass

from meshserve.v1 import types_pb2
from services.gateway.events import ChoiceEnd, Event, TextDelta


async def at_intervals(events: AsyncGenerator[Event], interval_s: float) -> AsyncGenerator[Event]:
    """Joins text that comes within `interval_s` of the last text sent for the same choice.

    The first text and the end of a choice never wait, and neither does what came before an error.
    """
    # Read by a task of its own, so that text is sent when its time has come, not with what follows.
    arrived: asyncio.Queue[Event | _End] = asyncio.Queue(1)
    reading = asyncio.create_task(_read(events, arrived))
    held: dict[int, TextDelta] = {}
    due: dict[int, float] = {}
    try:
        while True:
            event = await _next(arrived, min((due[index] for index in held), default=None))
            if isinstance(event, _End):
                break
            if isinstance(event, TextDelta):
                held[event.index] = _joined(held.pop(event.index, None), event)
            elif event is not None and event.index in held:
                yield held.pop(event.index)
            now = time.monotonic()
            for index in [index for index in held if due.get(index, 0.0) <= now]:
                due[index] = now + interval_s
                yield held.pop(index)
            if isinstance(event, ChoiceEnd):
                yield event
        for delta in held.values():
            yield delta
        if event.error is not None:
            raise event.error
    finally:
        reading.cancel()
        with suppress(asyncio.CancelledError):
            await reading


@dataclass(frozen=True, slots=True)
class _End:
    """The end of the events, and the error if that ended them."""

    error: Exception | None


async def _read(events: AsyncGenerator[Event], arrived: asyncio.Queue[Event | _End]) -> None:
    error: Exception | None = None
    try:
        async with aclosing(events):
            async for event in events:
                await arrived.put(event)
    except Exception as failure:
        error = failure
    await arrived.put(_End(error))


async def _next(arrived: asyncio.Queue[Event | _End], until: float | None) -> Event | _End | None:
    """What arrives, or None when the time has come before."""
    try:
        async with asyncio.timeout(None if until is None else until - time.monotonic()):
            return await arrived.get()
    except TimeoutError:
        return None


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
