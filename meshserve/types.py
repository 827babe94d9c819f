"""Results that the client returns: plain, typed, immutable values without protobuf."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime
from enum import StrEnum
from typing import Any


class FinishReason(StrEnum):
    """Why a completion ended."""

    STOP = "stop"
    """A stop string, a stop token or the model's own end of sequence."""
    LENGTH = "length"
    """`max_tokens` or the model's context was reached."""
    CONTENT_FILTER = "content_filter"
    """The safety filter ended it."""
    TOOL_CALLS = "tool_calls"
    """The model called a tool."""
    ABORTED = "aborted"
    """The request was aborted."""
    UNKNOWN = "unknown"
    """A reason that this version of the client does not know."""


class SafetyAction(StrEnum):
    """What the safety filter did with a finding, weakest first."""

    ALLOW = "allow"
    FLAG = "flag"
    REDACT = "redact"
    BLOCK = "block"
    UNKNOWN = "unknown"


@dataclass(frozen=True, slots=True)
class ToolCall:
    """A call of a tool that the model asks for."""

    name: str
    arguments_json: str = "{}"
    """Arguments as a JSON object in text, as the model wrote it."""
    id: str = ""


@dataclass(frozen=True, slots=True)
class Message:
    """One message of a conversation."""

    role: str
    """`system`, `developer`, `user`, `assistant` or `tool`."""
    content: str = ""
    name: str = ""
    tool_calls: tuple[ToolCall, ...] = ()
    tool_call_id: str = ""
    """For role `tool`: the id of the call that this message answers."""
    reasoning_content: str = ""
    """The model's reasoning, kept apart from its answer."""


@dataclass(frozen=True, slots=True)
class Tool:
    """A tool that the model may call."""

    name: str
    description: str = ""
    parameters: Mapping[str, Any] = field(default_factory=dict)
    """JSON Schema of the arguments."""


@dataclass(frozen=True, slots=True)
class Usage:
    """Tokens counted."""

    prompt_tokens: int = 0
    completion_tokens: int = 0
    cached_prompt_tokens: int = 0
    """Prompt tokens whose KV the engine had already; part of `prompt_tokens`."""
    reasoning_tokens: int = 0
    """Part of `completion_tokens`."""

    @property
    def total_tokens(self) -> int:
        """Prompt and completion tokens together."""
        return self.prompt_tokens + self.completion_tokens


@dataclass(frozen=True, slots=True)
class TokenLogprob:
    """A token and the natural logarithm of its probability."""

    token_id: int
    logprob: float
    text: bytes = b""
    """Its text; may be part of a character."""


@dataclass(frozen=True, slots=True)
class PositionLogprobs:
    """The chosen token at one position, and the likeliest ones if asked for."""

    chosen: TokenLogprob
    top: tuple[TokenLogprob, ...] = ()


@dataclass(frozen=True, slots=True)
class SafetyFinding:
    """One finding of the safety filter; it never repeats the text that was found."""

    category: str
    score: float
    action: SafetyAction
    detector: str = ""
    text_index: int = 0
    start: int = 0
    """In Unicode code points."""
    end: int = 0
    """Exclusive, in Unicode code points."""


@dataclass(frozen=True, slots=True)
class SafetyVerdict:
    """What the safety filter says of a text."""

    action: SafetyAction
    findings: tuple[SafetyFinding, ...] = ()
    policy_revision: str = ""


@dataclass(frozen=True, slots=True)
class Timings:
    """How long the engine worked on a choice, in seconds; None for what it has not told."""

    queue_s: float | None = None
    """From its arrival in the engine to the first step that computed it."""
    prefill_s: float | None = None
    """From there to its first token."""
    decode_s: float | None = None
    """From there to its last token."""
    steps: int = 0
    """Steps of the engine that computed it."""
    preemptions: int = 0
    """How often it had to make room for others."""


@dataclass(frozen=True, slots=True)
class Choice:
    """One finished completion of a prompt."""

    index: int
    text: str
    finish_reason: FinishReason
    matched_stop: str | int | None = None
    """The stop string or stop token that ended it; None for the model's own end of sequence."""
    token_ids: tuple[int, ...] = ()
    logprobs: tuple[PositionLogprobs, ...] = ()
    safety: SafetyVerdict | None = None
    timings: Timings | None = None
    """None for an answer from the response cache."""


@dataclass(frozen=True, slots=True)
class Completion:
    """The finished completions of a prompt."""

    request_id: str
    model: str
    choices: tuple[Choice, ...]
    usage: Usage
    cached: bool = False
    """Whether the answer came from the response cache."""
    create_time: datetime | None = None
    prompt_logprobs: tuple[PositionLogprobs, ...] = ()
    prompt_safety: SafetyVerdict | None = None
    adapter: str = ""
    """The adapter that answered; empty: none."""

    @property
    def text(self) -> str:
        """Text of the first choice."""
        return self.choices[0].text

    @property
    def finish_reason(self) -> FinishReason:
        """Why the first choice ended."""
        return self.choices[0].finish_reason

    def __str__(self) -> str:
        return self.text


@dataclass(frozen=True, slots=True)
class ChatChoice:
    """One finished answer to a conversation."""

    index: int
    message: Message
    finish_reason: FinishReason
    matched_stop: str | int | None = None
    token_ids: tuple[int, ...] = ()
    logprobs: tuple[PositionLogprobs, ...] = ()
    safety: SafetyVerdict | None = None
    timings: Timings | None = None

    @property
    def text(self) -> str:
        """What the model answered."""
        return self.message.content


@dataclass(frozen=True, slots=True)
class ChatCompletion:
    """The finished answers to a conversation."""

    request_id: str
    model: str
    choices: tuple[ChatChoice, ...]
    usage: Usage
    cached: bool = False
    create_time: datetime | None = None
    prompt_safety: SafetyVerdict | None = None
    prompt_logprobs: tuple[PositionLogprobs, ...] = ()
    adapter: str = ""
    """The adapter that answered; empty: none."""

    @property
    def message(self) -> Message:
        """The first answer, ready to be appended to the conversation."""
        return self.choices[0].message

    @property
    def text(self) -> str:
        """Text of the first answer."""
        return self.message.content

    @property
    def finish_reason(self) -> FinishReason:
        """Why the first answer ended."""
        return self.choices[0].finish_reason

    def __str__(self) -> str:
        return self.text


@dataclass(frozen=True, slots=True)
class CompletionChunk:
    """What one message of a stream adds to one choice."""

    index: int
    text: str
    token_ids: tuple[int, ...] = ()
    logprobs: tuple[PositionLogprobs, ...] = ()

    def __str__(self) -> str:
        return self.text


@dataclass(frozen=True, slots=True)
class ChatChunk:
    """What one message of a stream adds to one answer."""

    index: int
    text: str
    reasoning_content: str = ""
    tool_calls: tuple[ToolCall, ...] = ()
    token_ids: tuple[int, ...] = ()
    logprobs: tuple[PositionLogprobs, ...] = ()

    def __str__(self) -> str:
        return self.text


@dataclass(frozen=True, slots=True)
class TokenCount:
    """The number of tokens of an input, by the tokenizer of `model`."""

    tokens: int
    model: str

    def __int__(self) -> int:
        return self.tokens


@dataclass(frozen=True, slots=True)
class Model:
    """A model that the mesh serves."""

    name: str
    aliases: tuple[str, ...] = ()
    architecture: str = ""
    context_tokens: int = 0
    """Largest number of prompt and completion tokens together."""
    vocabulary_size: int = 0
    parameters: int = 0
    dtype: str = ""
    capabilities: tuple[str, ...] = ()
    """Of `generate`, `chat`, `embed`, `classify`, `score`."""
    ready: bool = False
    """Whether an engine is serving it now."""
    is_default: bool = False
    """Whether requests that name no model get this one, if it can do what they ask for."""
    embedding_size: int = 0
    """Components of its embeddings; 0: it makes none."""
    labels: tuple[str, ...] = ()
    """Classes that it tells apart, in its own order."""
    state: str = ""
    """What requests for it find: `unloaded`, `loading`, `ready`, `sleeping`, `draining` or
    `failed`; empty: not known."""
    adapters: tuple[str, ...] = ()
    """Names of its adapters, for `adapter` or for `model`."""
