"""Options that requests take, named and documented once for both clients."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypedDict

from meshserve.types import Message, Tool

MessageLike = Message | Mapping[str, Any]
"""A message: a `Message`, or a dict with at least `role` and `content`."""

Messages = Sequence[MessageLike]

Prompt = str | Sequence[int] | Messages
"""Text that is completed as it stands, token ids, or a conversation."""


@dataclass(frozen=True, slots=True)
class CacheControl:
    """What a request wants of the response cache."""

    no_cache: bool = False
    """Neither looked up nor stored."""
    no_store: bool = False
    """Looked up but not stored."""
    ttl_s: int | None = None
    """How long a stored answer may be served, in seconds. None: the server's own default."""


class RequestOptions(TypedDict, total=False):
    """Options that completions and chats share. An absent option means the model's own default."""

    model: str
    """Name or alias of a model. Default: the server's default model."""
    max_tokens: int | None
    """Largest number of completion tokens."""
    min_tokens: int | None
    """The completion does not end before this many tokens."""
    temperature: float | None
    """0 is greedy choice."""
    top_p: float | None
    """Keeps the smallest set of tokens whose probabilities reach this sum; in (0, 1]."""
    top_k: int | None
    """Keeps this many of the likeliest tokens; 0 keeps all."""
    min_p: float | None
    """Drops tokens less likely than this share of the likeliest one; in [0, 1]."""
    seed: int | None
    """Makes sampling repeatable."""
    repetition_penalty: float | None
    presence_penalty: float | None
    frequency_penalty: float | None
    logit_bias: Mapping[int, float] | None
    """Added to the logit of a token id."""
    allowed_token_ids: Sequence[int] | None
    banned_token_ids: Sequence[int] | None
    logits_processors: Sequence[str | Mapping[str, Any]] | None
    """Plugins of the engine that edit logits: names, or mappings with `name` and `arguments`."""
    n: int | None
    """Number of completions."""
    best_of: int | None
    """Completions drawn, of which the `n` likeliest are returned. Not with a stream."""
    beam_width: int | None
    """Beam search with this many beams instead of sampling."""
    length_penalty: float | None
    """What favours longer beams (above 0), or shorter ones. Default: 1."""
    early_stopping: bool | None
    """Whether beam search ends as soon as `beam_width` beams have ended."""
    stop: str | Sequence[str] | None
    """Texts that end the completion and are trimmed from it."""
    stop_token_ids: Sequence[int] | None
    ignore_eos: bool
    """Whether the model's own end-of-sequence tokens are ignored."""
    include_stop_in_text: bool
    json_schema: str | Mapping[str, Any] | None
    """The completion is JSON that fits this schema."""
    regex: str | None
    """The whole completion matches this."""
    choice: Sequence[str] | None
    """The completion is exactly one of these."""
    grammar: str | None
    """The completion follows this EBNF grammar."""
    priority: int
    """Requests of a higher priority run first; in [-100, 100]."""
    cache: bool | CacheControl | None
    """False keeps the request away from the response cache."""
    request_id: str
    """Names the request in logs, traces and the answer. Default: chosen by the server."""
    logprobs: int | None
    """Log-probability of each token, with this many alternatives."""
    prompt_logprobs: int | None
    """The same of each prompt token from the second on."""
    echo: bool
    """Whether the prompt is repeated before the completion."""
    return_token_ids: bool
    """Whether token ids are returned beside text."""
    keep_special_tokens: bool
    truncation: Literal["refuse", "drop_oldest", "drop_newest"] | None
    """What happens to a prompt that does not fit."""
    adapter: str
    """Name of a loaded adapter."""


class TemplateOptions(TypedDict, total=False):
    """Options of the chat template, for every input that is a conversation."""

    tools: Sequence[Tool | Mapping[str, Any]] | None
    add_generation_prompt: bool | None
    """Whether the prompt ends with the opening of an assistant message. Default: true."""
    continue_final_message: bool
    """Whether the last message is left open for the model to continue."""
    template_arguments: Mapping[str, Any] | None
    """Further variables of the chat template."""
    chat_template: str
    """Jinja source used instead of the model's own template."""


class GenerateOptions(RequestOptions, TemplateOptions, total=False):
    """Options of `generate` and `stream_generate`."""

    add_special_tokens: bool | None
    """Whether special tokens such as the beginning of sequence are added to a text prompt."""


class ChatOptions(RequestOptions, TemplateOptions, total=False):
    """Options of `chat` and `stream_chat`."""

    tool_choice: str | None
    """`auto`, `none`, `required`, or the name of the tool that must be called."""


class CountOptions(TemplateOptions, total=False):
    """Options of `count_tokens`."""

    model: str
    add_special_tokens: bool | None


class EncodingOptions(TypedDict, total=False):
    """Options that `embed`, `classify` and `score` share."""

    model: str
    """Name or alias of a model. Default: the first one that can do what is asked for."""
    request_id: str
    """Names the request in logs, traces and the answer. Default: chosen by the server."""
    truncation: Literal["refuse", "drop_oldest", "drop_newest"] | None
    """What happens to a text that does not fit. Default: it is refused."""


class EmbedOptions(EncodingOptions, total=False):
    """Options of `embed`."""

    pooling: Literal["mean", "first", "last"] | None
    """How the vectors of tokens become one. Default: the model's own."""
    normalize: bool | None
    """Whether vectors have length 1. Default: the model's own."""
    dimensions: int | None
    """Components kept of each vector, the first ones, before its length is made 1."""
    cache: bool | CacheControl | None
    """False keeps the request away from the response cache."""


class ClassifyOptions(EncodingOptions, total=False):
    """Options of `classify`."""

    top_k: int
    """Classes returned per text, likeliest first; 0 returns all."""


class ScoreOptions(EncodingOptions, total=False):
    """Options of `score`."""
