"""Turns response messages into the typed results of meshserve.types."""

from __future__ import annotations

from collections.abc import Iterable
from datetime import UTC, datetime

from google.protobuf import timestamp_pb2

from meshserve.types import (
    ChatChoice,
    ChatChunk,
    ChatCompletion,
    Choice,
    Completion,
    CompletionChunk,
    FinishReason,
    Message,
    Model,
    PositionLogprobs,
    SafetyAction,
    SafetyFinding,
    SafetyVerdict,
    Timings,
    TokenCount,
    TokenLogprob,
    ToolCall,
    Usage,
)
from meshserve.v1 import engine_pb2, gateway_pb2, types_pb2

_FINISH_REASONS = {
    types_pb2.FINISH_REASON_STOP: FinishReason.STOP,
    types_pb2.FINISH_REASON_LENGTH: FinishReason.LENGTH,
    types_pb2.FINISH_REASON_CONTENT_FILTER: FinishReason.CONTENT_FILTER,
    types_pb2.FINISH_REASON_TOOL_CALLS: FinishReason.TOOL_CALLS,
    types_pb2.FINISH_REASON_ABORTED: FinishReason.ABORTED,
}
_SAFETY_ACTIONS = {
    types_pb2.SAFETY_ACTION_UNSPECIFIED: SafetyAction.ALLOW,
    types_pb2.SAFETY_ACTION_ALLOW: SafetyAction.ALLOW,
    types_pb2.SAFETY_ACTION_FLAG: SafetyAction.FLAG,
    types_pb2.SAFETY_ACTION_REDACT: SafetyAction.REDACT,
    types_pb2.SAFETY_ACTION_BLOCK: SafetyAction.BLOCK,
}
_ROLE_NAMES = {
    types_pb2.ROLE_SYSTEM: "system",
    types_pb2.ROLE_DEVELOPER: "developer",
    types_pb2.ROLE_USER: "user",
    types_pb2.ROLE_ASSISTANT: "assistant",
    types_pb2.ROLE_TOOL: "tool",
}
_CAPABILITY_NAMES = {
    types_pb2.MODEL_CAPABILITY_GENERATE: "generate",
    types_pb2.MODEL_CAPABILITY_CHAT: "chat",
    types_pb2.MODEL_CAPABILITY_EMBED: "embed",
    types_pb2.MODEL_CAPABILITY_CLASSIFY: "classify",
    types_pb2.MODEL_CAPABILITY_SCORE: "score",
}


def completion(response: gateway_pb2.GenerateResponse) -> Completion:
    """The finished completions of a unary call."""
    return Completion(
        request_id=response.request_id,
        model=response.model,
        adapter=response.adapter,
        choices=tuple(
            Choice(
                index=choice.index,
                text=choice.text,
                finish_reason=finish_reason(choice.finish_reason),
                matched_stop=matched_stop(choice.matched_stop),
                token_ids=tuple(choice.token_ids),
                logprobs=logprobs(choice.logprobs),
                safety=verdict(choice.safety) if choice.HasField("safety") else None,
                timings=timings(choice.timings) if choice.HasField("timings") else None,
            )
            for choice in sorted(response.choices, key=lambda choice: choice.index)
        ),
        usage=usage(response.usage),
        cached=response.cached,
        create_time=(timestamp(response.create_time) if response.HasField("create_time") else None),
        prompt_logprobs=logprobs(response.prompt_logprobs),
        prompt_safety=(
            verdict(response.prompt_safety) if response.HasField("prompt_safety") else None
        ),
    )


def chat_completion(response: gateway_pb2.ChatResponse) -> ChatCompletion:
    """The finished answers of a unary call."""
    return ChatCompletion(
        request_id=response.request_id,
        model=response.model,
        adapter=response.adapter,
        choices=tuple(
            ChatChoice(
                index=choice.index,
                message=message(choice.message),
                finish_reason=finish_reason(choice.finish_reason),
                matched_stop=matched_stop(choice.matched_stop),
                token_ids=tuple(choice.token_ids),
                logprobs=logprobs(choice.logprobs),
                safety=verdict(choice.safety) if choice.HasField("safety") else None,
                timings=timings(choice.timings) if choice.HasField("timings") else None,
            )
            for choice in sorted(response.choices, key=lambda choice: choice.index)
        ),
        usage=usage(response.usage),
        cached=response.cached,
        create_time=(timestamp(response.create_time) if response.HasField("create_time") else None),
        prompt_logprobs=logprobs(response.prompt_logprobs),
        prompt_safety=(
            verdict(response.prompt_safety) if response.HasField("prompt_safety") else None
        ),
    )


def completion_chunk(delta: gateway_pb2.ChoiceDelta) -> CompletionChunk:
    """What one message adds to one choice."""
    return CompletionChunk(
        delta.index, delta.text, tuple(delta.token_ids), logprobs(delta.logprobs)
    )


def chat_chunk(delta: gateway_pb2.ChatDelta) -> ChatChunk:
    """What one message adds to one answer."""
    return ChatChunk(
        index=delta.index,
        text=delta.content,
        reasoning_content=delta.reasoning_content,
        tool_calls=tool_calls(delta.tool_calls),
        token_ids=tuple(delta.token_ids),
        logprobs=logprobs(delta.logprobs),
    )


def token_count(response: gateway_pb2.CountTokensResponse) -> TokenCount:
    """The number of tokens of an input."""
    return TokenCount(response.tokens, response.model)


def model(source: gateway_pb2.Model) -> Model:
    """A model as callers see it."""
    return Model(
        name=source.name,
        aliases=tuple(source.aliases),
        architecture=source.architecture,
        context_tokens=source.context_tokens,
        vocabulary_size=source.vocabulary_size,
        parameters=source.parameters,
        dtype=source.dtype,
        capabilities=tuple(
            _CAPABILITY_NAMES[kind] for kind in source.capabilities if kind in _CAPABILITY_NAMES
        ),
        ready=source.ready,
        is_default=source.is_default,
        embedding_size=source.embedding_size,
        labels=tuple(source.labels),
        state=model_state(source.state),
        adapters=tuple(source.adapters),
    )


def model_state(value: engine_pb2.ModelState.ValueType) -> str:
    """A state's name; empty for one that is not known."""
    known = engine_pb2.ModelState.values()
    if value not in known or value == engine_pb2.MODEL_STATE_UNSPECIFIED:
        return ""
    return engine_pb2.ModelState.Name(value).removeprefix("MODEL_STATE_").lower()


def message(source: types_pb2.ChatMessage) -> Message:
    """A message of a conversation."""
    return Message(
        role=_ROLE_NAMES.get(source.role, "assistant"),
        content=source.content,
        name=source.name,
        tool_calls=tool_calls(source.tool_calls),
        tool_call_id=source.tool_call_id,
        reasoning_content=source.reasoning_content,
    )


def tool_calls(source: Iterable[types_pb2.ToolCall]) -> tuple[ToolCall, ...]:
    """Calls of tools, with absent arguments as the empty object that they mean."""
    return tuple(ToolCall(call.name, call.arguments_json or "{}", call.id) for call in source)


def finish_reason(value: types_pb2.FinishReason.ValueType) -> FinishReason:
    """Why a choice ended; a newer server's reasons become UNKNOWN."""
    return _FINISH_REASONS.get(value, FinishReason.UNKNOWN)


def matched_stop(source: types_pb2.MatchedStop) -> str | int | None:
    """The stop string or stop token, or None for the model's own end of sequence."""
    kind = source.WhichOneof("stop")
    if kind == "text":
        return source.text
    return source.token_id if kind == "token_id" else None


def usage(source: types_pb2.Usage) -> Usage:
    """Tokens counted."""
    return Usage(
        prompt_tokens=source.prompt_tokens,
        completion_tokens=source.completion_tokens,
        cached_prompt_tokens=source.cached_prompt_tokens,
        reasoning_tokens=source.reasoning_tokens,
    )


def timings(source: types_pb2.GenerationTimings) -> Timings:
    """How long the engine worked on a choice."""
    return Timings(
        queue_s=source.queue_ms / 1000 if source.HasField("queue_ms") else None,
        prefill_s=source.prefill_ms / 1000 if source.HasField("prefill_ms") else None,
        decode_s=source.decode_ms / 1000 if source.HasField("decode_ms") else None,
        steps=source.steps,
        preemptions=source.preemptions,
    )


def total_usage(choices: Iterable[Usage]) -> Usage:
    """The usage of a request from that of its choices: the prompt counts once."""
    parts = list(choices)
    return Usage(
        prompt_tokens=max((part.prompt_tokens for part in parts), default=0),
        completion_tokens=sum(part.completion_tokens for part in parts),
        cached_prompt_tokens=max((part.cached_prompt_tokens for part in parts), default=0),
        reasoning_tokens=sum(part.reasoning_tokens for part in parts),
    )


def logprobs(source: types_pb2.Logprobs) -> tuple[PositionLogprobs, ...]:
    """Log-probabilities by position; empty where none were asked for."""
    return tuple(
        PositionLogprobs(
            _token_logprob(position.chosen), tuple(_token_logprob(top) for top in position.top)
        )
        for position in source.positions
    )


def verdict(source: types_pb2.SafetyVerdict) -> SafetyVerdict:
    """What the safety filter says of a text."""
    return SafetyVerdict(
        action=_SAFETY_ACTIONS.get(source.action, SafetyAction.UNKNOWN),
        findings=tuple(
            SafetyFinding(
                category=finding.category,
                score=finding.score,
                action=_SAFETY_ACTIONS.get(finding.action, SafetyAction.UNKNOWN),
                detector=finding.detector,
                text_index=finding.text_index,
                start=finding.start,
                end=finding.end,
            )
            for finding in source.findings
        ),
        policy_revision=source.policy_revision,
    )


def timestamp(source: timestamp_pb2.Timestamp) -> datetime:
    """A moment in UTC."""
    return source.ToDatetime(tzinfo=UTC)


def _token_logprob(source: types_pb2.TokenLogprob) -> TokenLogprob:
    return TokenLogprob(source.token_id, source.logprob, source.text)
