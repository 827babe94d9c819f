"""A kept answer as the events it was made of, and the events of an answer as one to keep."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Iterable

from google.protobuf.timestamp_pb2 import Timestamp

from meshserve.v1 import cache_pb2
from services.gateway.events import ChoiceEnd, Event, TextDelta


async def replay(answer: cache_pb2.CachedAnswer) -> AsyncGenerator[Event]:
    """The events of a kept answer, in the order they were sent."""
    for chunk in answer.chunks:
        yield TextDelta(
            chunk.index,
            chunk.text,
            list(chunk.token_ids),
            chunk.logprobs if chunk.HasField("logprobs") else None,
        )
    for end in answer.ends:
        yield ChoiceEnd(
            end.index,
            end.finish_reason,
            end.matched_stop if end.HasField("matched_stop") else None,
            end.usage,
            end.safety if end.HasField("safety") else None,
        )


def to_keep(events: Iterable[Event], arrived_unix_ns: int) -> cache_pb2.CachedAnswer:
    """An answer to keep, of all events of a request."""
    created = Timestamp()
    created.FromNanoseconds(arrived_unix_ns)
    answer = cache_pb2.CachedAnswer(create_time=created)
    for event in events:
        if isinstance(event, TextDelta):
            answer.chunks.add(
                index=event.index,
                text=event.text,
                token_ids=event.token_ids,
                logprobs=event.logprobs,
            )
        else:
            answer.ends.add(
                index=event.index,
                finish_reason=event.finish_reason,
                matched_stop=event.matched_stop,
                usage=event.usage,
                safety=event.safety,
            )
    return answer
