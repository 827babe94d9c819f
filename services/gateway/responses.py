"""Events as the messages of the four generation methods."""

from __future__ import annotations

from google.protobuf.timestamp_pb2 import Timestamp

from meshserve.v1 import gateway_pb2, types_pb2
from services.gateway.context import RequestContext
from services.gateway.events import ChoiceEnd, Event
from services.gateway.timings import generation_timings
from services.gateway.usage import total_usage


class _Choice:
    """One choice, put together again."""

    def __init__(self) -> None:
        self.text: list[str] = []
        self.token_ids: list[int] = []
        self.logprobs: types_pb2.Logprobs | None = None
        self.end: ChoiceEnd | None = None


def generate_response(context: RequestContext) -> gateway_pb2.GenerateResponse:
    """The finished answer to Generate."""
    response = gateway_pb2.GenerateResponse(
        request_id=context.request_id,
        model=context.served.name,
        adapter=context.adapter,
        usage=total_usage(context),
        cached=context.cached_answer is not None,
        create_time=_timestamp(context),
        prompt_logprobs=_prompt_logprobs(context),
        prompt_safety=context.prompt_safety,
    )
    for index, choice in _choices(context).items():
        assert choice.end is not None
        response.choices.add(
            index=index,
            text="".join(choice.text),
            finish_reason=choice.end.finish_reason,
            matched_stop=choice.end.matched_stop,
            token_ids=choice.token_ids,
            logprobs=choice.logprobs,
            safety=choice.end.safety,
            timings=generation_timings(context, index),
        )
    return response


def chat_response(context: RequestContext) -> gateway_pb2.ChatResponse:
    """The finished answer to Chat."""
    response = gateway_pb2.ChatResponse(
        request_id=context.request_id,
        model=context.served.name,
        adapter=context.adapter,
        usage=total_usage(context),
        cached=context.cached_answer is not None,
        create_time=_timestamp(context),
        prompt_logprobs=_prompt_logprobs(context),
        prompt_safety=context.prompt_safety,
    )
    for index, choice in _choices(context).items():
        assert choice.end is not None
        response.choices.add(
            index=index,
            message=types_pb2.ChatMessage(
                role=types_pb2.ROLE_ASSISTANT, content="".join(choice.text)
            ),
            finish_reason=choice.end.finish_reason,
            matched_stop=choice.end.matched_stop,
            token_ids=choice.token_ids,
            logprobs=choice.logprobs,
            safety=choice.end.safety,
            timings=generation_timings(context, index),
        )
    return response


def started(context: RequestContext) -> gateway_pb2.GenerationStarted:
    """What opens a stream, once the first event is there."""
    cached = context.cached_answer
    prompt_tokens = cached.ends[0].usage.prompt_tokens if cached else len(context.prompt_token_ids)
    return gateway_pb2.GenerationStarted(
        model=context.served.name,
        adapter=context.adapter,
        create_time=_timestamp(context),
        prompt_tokens=prompt_tokens,
        prompt_logprobs=_prompt_logprobs(context),
        prompt_safety=context.prompt_safety,
    )


def complete(context: RequestContext, end: ChoiceEnd) -> gateway_pb2.GenerationComplete:
    """The end of a choice on a stream."""
    return gateway_pb2.GenerationComplete(
        index=end.index,
        finish_reason=end.finish_reason,
        matched_stop=end.matched_stop,
        usage=end.usage,
        cached=context.cached_answer is not None,
        safety=end.safety,
        timings=generation_timings(context, end.index),
    )


def generate_event(context: RequestContext, event: Event) -> gateway_pb2.StreamGenerateResponse:
    """One event as a message of StreamGenerate."""
    if isinstance(event, ChoiceEnd):
        return gateway_pb2.StreamGenerateResponse(
            request_id=context.request_id, complete=complete(context, event)
        )
    delta = gateway_pb2.ChoiceDelta(
        index=event.index, text=event.text, token_ids=event.token_ids, logprobs=event.logprobs
    )
    return gateway_pb2.StreamGenerateResponse(
        request_id=context.request_id, chunk=gateway_pb2.GenerationChunk(deltas=[delta])
    )


def chat_event(context: RequestContext, event: Event) -> gateway_pb2.StreamChatResponse:
    """One event as a message of StreamChat."""
    if isinstance(event, ChoiceEnd):
        return gateway_pb2.StreamChatResponse(
            request_id=context.request_id, complete=complete(context, event)
        )
    delta = gateway_pb2.ChatDelta(
        index=event.index, content=event.text, token_ids=event.token_ids, logprobs=event.logprobs
    )
    return gateway_pb2.StreamChatResponse(
        request_id=context.request_id, chunk=gateway_pb2.ChatChunk(deltas=[delta])
    )


def _choices(context: RequestContext) -> dict[int, _Choice]:
    choices: dict[int, _Choice] = {}
    for event in context.events:
        choice = choices.setdefault(event.index, _Choice())
        if isinstance(event, ChoiceEnd):
            choice.end = event
            continue
        choice.text.append(event.text)
        choice.token_ids += event.token_ids
        if event.logprobs is not None:
            if choice.logprobs is None:
                choice.logprobs = types_pb2.Logprobs()
            choice.logprobs.MergeFrom(event.logprobs)
    return dict(sorted(choices.items()))


def _prompt_logprobs(context: RequestContext) -> types_pb2.Logprobs | None:
    cached = context.cached_answer
    if cached is not None:
        return cached.prompt_logprobs if cached.HasField("prompt_logprobs") else None
    return context.prompt_logprobs


def _timestamp(context: RequestContext) -> Timestamp:
    timestamp = Timestamp()
    timestamp.FromNanoseconds(context.arrived_unix_ns)
    return timestamp
