"""Of the completions that were drawn, the likeliest."""

from __future__ import annotations

from collections.abc import AsyncGenerator

from services.gateway.context import RequestContext
from services.gateway.events import Event, TextDelta


class _Drawn:
    """One completion, kept until all are there."""

    def __init__(self) -> None:
        self.events: list[Event] = []
        self._logprob = 0.0
        self._tokens = 0

    def add(self, event: Event, *, wants_logprobs: bool) -> None:
        if isinstance(event, TextDelta) and event.logprobs is not None:
            self._logprob += sum(each.chosen.logprob for each in event.logprobs.positions)
            self._tokens += len(event.logprobs.positions)
            if not wants_logprobs:
                event.logprobs = None
        self.events.append(event)

    @property
    def mean_logprob(self) -> float:
        return self._logprob / max(1, self._tokens)


async def likeliest(
    context: RequestContext, events: AsyncGenerator[Event]
) -> AsyncGenerator[Event]:
    """The events of the choices with the highest mean log-probability of their tokens, the
    likeliest first, once all have ended. Their indexes, usages and timings follow that order."""
    drawn = [_Drawn() for _ in range(context.drawn)]
    wants_logprobs = context.request.output.HasField("logprobs")
    try:
        async for event in events:
            drawn[event.index].add(event, wants_logprobs=wants_logprobs)
    finally:
        await events.aclose()
    order = sorted(range(len(drawn)), key=lambda index: -drawn[index].mean_logprob)
    context.usages = {rank: context.usages[index] for rank, index in enumerate(order)}
    timings = context.engine_timings
    context.engine_timings = {
        rank: timings[index] for rank, index in enumerate(order) if index in timings
    }
    for rank, index in enumerate(order[: context.choices]):
        for event in drawn[index].events:
            event.index = rank
            yield event
