"""Builds request messages from what callers pass."""

from __future__ import annotations

import difflib
import json
from collections.abc import Mapping, Sequence
from functools import cache
from typing import Any, cast, get_type_hints

from meshserve.options import (
    CacheControl,
    ChatOptions,
    CountOptions,
    GenerateOptions,
    Messages,
    Prompt,
    TemplateOptions,
)
from meshserve.types import Message
from meshserve.v1 import gateway_pb2, types_pb2
from meshserve.wire.assign import (
    assign,
    assign_struct,
    checked_text,
    extend,
    invalid_field,
    one_of,
)
from meshserve.wire.conversations import fill_conversation

TRUNCATIONS = {
    "refuse": types_pb2.TRUNCATION_POLICY_REFUSE,
    "drop_oldest": types_pb2.TRUNCATION_POLICY_DROP_OLDEST,
    "drop_newest": types_pb2.TRUNCATION_POLICY_DROP_NEWEST,
}
_TOOL_CHOICES = {
    "auto": gateway_pb2.TOOL_CHOICE_AUTO,
    "none": gateway_pb2.TOOL_CHOICE_NONE,
    "required": gateway_pb2.TOOL_CHOICE_REQUIRED,
}
_SAMPLING_SCALARS = (
    "temperature",
    "top_p",
    "top_k",
    "min_p",
    "seed",
    "repetition_penalty",
    "presence_penalty",
    "frequency_penalty",
    "n",
    "best_of",
    "beam_width",
    "length_penalty",
    "early_stopping",
)


def generate_request(prompt: Prompt, options: GenerateOptions) -> gateway_pb2.GenerateRequest:
    """The message that asks for the completion of `prompt`. Raises InvalidRequestError."""
    refuse_unknown(options, GenerateOptions)
    request = gateway_pb2.GenerateRequest()
    if isinstance(prompt, str):
        request.text = checked_text(prompt, "text")
        _refuse_template_options(options)
    elif _is_token_ids(prompt):
        request.token_ids.SetInParent()
        extend(request.token_ids, "ids", prompt, "token_ids.ids")
        _refuse_template_options(options)
    else:
        fill_conversation(request.conversation, cast(Messages, prompt), options)
    assign(request, "add_special_tokens", options.get("add_special_tokens"), "add_special_tokens")
    _fill_common(request, options)
    return request


def chat_request(messages: str | Messages, options: ChatOptions) -> gateway_pb2.ChatRequest:
    """The message that asks for the answer to a conversation. Raises InvalidRequestError."""
    refuse_unknown(options, ChatOptions)
    request = gateway_pb2.ChatRequest()
    if isinstance(messages, str):
        messages = [Message("user", checked_text(messages, "conversation.messages[0].content"))]
    fill_conversation(request.conversation, messages, options)
    choice = options.get("tool_choice")
    if choice is not None:
        if not isinstance(choice, str):
            raise invalid_field("tool_choice", f"must be text, not {type(choice).__name__}")
        request.tool_choice = _TOOL_CHOICES.get(choice, gateway_pb2.TOOL_CHOICE_REQUIRED)
        if choice not in _TOOL_CHOICES:
            request.required_tool = checked_text(choice, "required_tool")
    _fill_common(request, options)
    return request


def count_tokens_request(
    prompt: str | Messages, options: CountOptions
) -> gateway_pb2.CountTokensRequest:
    """The message that asks what an input costs. Raises InvalidRequestError."""
    refuse_unknown(options, CountOptions)
    request = gateway_pb2.CountTokensRequest()
    if isinstance(prompt, str):
        request.text = checked_text(prompt, "text")
        _refuse_template_options(options)
    else:
        fill_conversation(request.conversation, prompt, options)
    assign(request, "model", options.get("model"), "model")
    assign(request, "add_special_tokens", options.get("add_special_tokens"), "add_special_tokens")
    return request


def stream_generate_request(
    prompt: Prompt, options: GenerateOptions, min_interval_ms: int | None
) -> gateway_pb2.StreamGenerateRequest:
    """The message that asks for a completion as a stream. Raises InvalidRequestError."""
    request = gateway_pb2.StreamGenerateRequest(request=generate_request(prompt, options))
    _fill_stream_options(request.stream_options, min_interval_ms)
    return request


def stream_chat_request(
    messages: str | Messages, options: ChatOptions, min_interval_ms: int | None
) -> gateway_pb2.StreamChatRequest:
    """The message that asks for an answer as a stream. Raises InvalidRequestError."""
    request = gateway_pb2.StreamChatRequest(request=chat_request(messages, options))
    _fill_stream_options(request.stream_options, min_interval_ms)
    return request


def get_model_request(name: str) -> gateway_pb2.GetModelRequest:
    """The message that asks for one model. Raises InvalidRequestError."""
    return gateway_pb2.GetModelRequest(model=checked_text(name, "model"))


def request_id_of(request: object) -> str:
    """The id that the caller chose for a request, or the empty text."""
    inner = getattr(request, "request", request)
    return str(getattr(inner, "request_id", ""))


def _fill_stream_options(options: gateway_pb2.StreamOptions, min_interval_ms: int | None) -> None:
    assign(options, "min_interval_ms", min_interval_ms, "stream_options.min_interval_ms")


def _fill_common(
    request: gateway_pb2.GenerateRequest | gateway_pb2.ChatRequest,
    options: GenerateOptions | ChatOptions,
) -> None:
    for name in ("model", "priority", "request_id", "adapter"):
        assign(request, name, options.get(name), name)
    _fill_sampling(request.sampling, options)
    _fill_stopping(request.stopping, options)
    _fill_constraint(request, options)
    fill_cache_control(request, options.get("cache"))
    output = request.output
    for name in ("logprobs", "prompt_logprobs", "echo", "keep_special_tokens"):
        assign(output, name, options.get(name), f"output.{name}")
    assign(output, "token_ids", options.get("return_token_ids"), "output.token_ids")
    truncation = options.get("truncation")
    if truncation is not None:
        if truncation not in TRUNCATIONS:
            raise invalid_field("truncation", one_of(truncation, TRUNCATIONS))
        request.truncation = TRUNCATIONS[truncation]


def _fill_sampling(
    sampling: types_pb2.SamplingParams, options: GenerateOptions | ChatOptions
) -> None:
    for name in _SAMPLING_SCALARS:
        assign(sampling, name, options.get(name), f"sampling.{name}")
    for name in ("allowed_token_ids", "banned_token_ids"):
        extend(sampling, name, options.get(name), f"sampling.{name}")
    _fill_logits_processors(sampling, options.get("logits_processors") or ())
    biases = options.get("logit_bias")
    if biases is not None and not isinstance(biases, Mapping):
        raise invalid_field("sampling.logit_bias", "must map token ids to numbers")
    for token_id, bias in (biases or {}).items():
        try:
            sampling.logit_bias[token_id] = bias
        except (TypeError, ValueError):
            raise invalid_field(
                "sampling.logit_bias", f"{token_id!r}: {bias!r} is not a token id with a number"
            ) from None


def _fill_logits_processors(
    sampling: types_pb2.SamplingParams, processors: Sequence[str | Mapping[str, Any]]
) -> None:
    for position, given in enumerate(processors):
        path = f"sampling.logits_processors[{position}]"
        named: Mapping[str, Any] = {"name": given} if isinstance(given, str) else given
        if not isinstance(named, Mapping) or not {"name"} <= named.keys() <= {"name", "arguments"}:
            raise invalid_field(path, "must be a name, or a mapping with name and arguments")
        processor = sampling.logits_processors.add()
        assign(processor, "name", named["name"], f"{path}.name")
        if "arguments" in named:
            assign_struct(processor.arguments, named["arguments"], f"{path}.arguments")


def _fill_stopping(
    stopping: types_pb2.StoppingCriteria, options: GenerateOptions | ChatOptions
) -> None:
    for name in ("max_tokens", "min_tokens", "ignore_eos", "include_stop_in_text"):
        assign(stopping, name, options.get(name), f"stopping.{name}")
    stop = options.get("stop")
    stops = [stop] if isinstance(stop, str) else stop
    extend(stopping, "stop_strings", stops, "stopping.stop_strings")
    extend(stopping, "stop_token_ids", options.get("stop_token_ids"), "stopping.stop_token_ids")


def _fill_constraint(
    request: gateway_pb2.GenerateRequest | gateway_pb2.ChatRequest,
    options: GenerateOptions | ChatOptions,
) -> None:
    names = ("json_schema", "regex", "choice", "grammar")
    given = [name for name in names if options.get(name) is not None]
    if len(given) > 1:
        raise invalid_field("constraint", f"{' and '.join(given)} exclude each other; give one")
    if not given:
        return
    name, value = given[0], options.get(given[0])
    constraint = request.constraint
    if name == "choice":
        constraint.choice.SetInParent()
        extend(constraint.choice, "values", value, "constraint.choice.values")
        return
    if name == "json_schema" and not isinstance(value, str):
        try:
            value = json.dumps(value)
        except (TypeError, ValueError) as error:
            raise invalid_field("constraint.json_schema", f"is not JSON: {error}") from None
        except RecursionError:
            raise invalid_field("constraint.json_schema", "is nested too deeply") from None
    assign(constraint, name, value, f"constraint.{name}")


def fill_cache_control(
    request: gateway_pb2.GenerateRequest | gateway_pb2.ChatRequest | gateway_pb2.EmbedRequest,
    cache: bool | CacheControl | None,
) -> None:
    """Sets what a request wants of the response cache. Raises InvalidRequestError."""
    if cache is None or cache is True:
        return
    if cache is False:
        request.cache_control.no_cache = True
        return
    if not isinstance(cache, CacheControl):
        raise invalid_field("cache_control", "must be True, False or a CacheControl")
    for name in ("no_cache", "no_store", "ttl_s"):
        assign(request.cache_control, name, getattr(cache, name), f"cache_control.{name}")


def _is_token_ids(prompt: object) -> bool:
    """Whether a prompt that is not text is made of token ids; an empty one is."""
    if isinstance(prompt, Mapping | Message | bytes) or not isinstance(prompt, Sequence):
        return False
    return all(isinstance(item, int) for item in prompt)


def _refuse_template_options(options: TemplateOptions) -> None:
    for name in TemplateOptions.__annotations__:
        if options.get(name):
            raise invalid_field(f"conversation.{name}", "applies to a conversation alone")


def refuse_unknown(options: Mapping[str, Any], schema: type) -> None:
    """Raises TypeError for an option that the schema does not have, with the nearest one."""
    known = _names_of(schema)
    for name in options:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            raise TypeError(f"unknown option {name!r}{hint}")


@cache
def _names_of(schema: type) -> tuple[str, ...]:
    """The options of a schema; finding them out takes longer than all the rest of a request."""
    return tuple(get_type_hints(schema))
