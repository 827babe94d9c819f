"""The tables of all spans and events; docs/telemetry.md and a test are held against them.

Attribute names are those of the OpenTelemetry semantic conventions 1.41.1 where they have one
(`rpc.*`, `server.*`, `gen_ai.*`, `error.type`, `exception.*`), and `meshserve.*` otherwise. No
attribute ever carries text of a prompt or a completion.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

RPC_ATTRIBUTES = ("rpc.system.name", "rpc.method", "rpc.response.status_code")
# What any span may carry: the first where it failed, the second where it is asked for.
COMMON_ATTRIBUTES = ("error.type", "openinference.span.kind")


@dataclass(frozen=True, slots=True)
class SpanDeclaration:
    """One row: a span's name, who makes it, and what it may carry beside COMMON_ATTRIBUTES."""

    name: str
    service: str
    kind: Literal["server", "client", "internal"]
    meaning: str
    attributes: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class EventDeclaration:
    """One row: a moment within spans, which of them may have it, and what it may carry."""

    name: str
    spans: tuple[str, ...]
    meaning: str
    attributes: tuple[str, ...] = ()


SAFETY_ATTRIBUTES = ("meshserve.safety.action", "meshserve.safety.categories")
# What the path of a request consists of: name, meaning, attributes.
STAGES: tuple[tuple[str, str, tuple[str, ...]], ...] = (
    ("authenticate", "Who calls, and whether they may use the model.", ()),
    ("admit", "Rate limit and room for one more request.", ()),
    ("route", "Which model and which engines.", ()),
    (
        "look_up",
        "The response cache: `hit`, `coalesced` (an equal request was being computed, and its "
        "answer was waited for), `pending` (waited for in vain), `miss`, `partial` (some of the "
        "vectors asked for were found), `bypassed` (the request has no answer that could be kept) "
        "or `unavailable`.",
        (
            "meshserve.cache.outcome",
            "meshserve.cache.kind",
            "meshserve.inputs",
            "meshserve.cached_inputs",
        ),
    ),
    ("screen", "The prompt check, side by side with tokenization.", SAFETY_ATTRIBUTES),
    ("tokenize", "The prompt's token ids.", ("meshserve.prompt_tokens",)),
    ("generate", "The engine's tokens, turned into text, stop strings cut.", ()),
    ("encode", "The engine's vectors, classes or scores of all inputs.", ()),
    ("moderate", "The completion check.", SAFETY_ATTRIBUTES),
    ("settle", "Usage counted, answer kept, limits settled.", ()),
)

SPANS: tuple[SpanDeclaration, ...] = (
    SpanDeclaration(
        "{package}.{Service}/{Method}",
        "every service",
        "server",
        "A call answered. One per RPC, unary or streaming.",
        RPC_ATTRIBUTES,
    ),
    SpanDeclaration(
        "{package}.{Service}/{Method}",
        "every service",
        "client",
        "A call made to another service; the address is that of the replica that was asked.",
        (*RPC_ATTRIBUTES, "server.address", "server.port"),
    ),
    SpanDeclaration(
        "{METHOD} {route}",
        "gateway",
        "server",
        "A call answered by HTTP. The route is the pattern of its path.",
        ("http.request.method", "http.route", "http.response.status_code"),
    ),
    SpanDeclaration(
        "{operation} {model}",
        "gateway",
        "internal",
        "An inference request: `chat`, `text_completion`, `embeddings`, `classify` or `score`, "
        "then the model. Parent of the stages.",
        (
            "gen_ai.operation.name",
            "gen_ai.provider.name",
            "gen_ai.request.model",
            "gen_ai.response.model",
            "gen_ai.response.id",
            "gen_ai.request.max_tokens",
            "gen_ai.request.temperature",
            "gen_ai.request.top_p",
            "gen_ai.request.top_k",
            "gen_ai.request.frequency_penalty",
            "gen_ai.request.presence_penalty",
            "gen_ai.request.seed",
            "gen_ai.request.stream",
            "gen_ai.request.choice.count",
            "gen_ai.embeddings.dimension.count",
            "gen_ai.response.finish_reasons",
            "gen_ai.usage.input_tokens",
            "gen_ai.usage.cache_read.input_tokens",
            "gen_ai.usage.output_tokens",
            "gen_ai.response.time_to_first_chunk",
            "server.address",
            "server.port",
            "meshserve.tenant",
            "meshserve.adapter",
            "meshserve.cached",
            "meshserve.inputs",
            "meshserve.cancelled",
        ),
    ),
    *(
        SpanDeclaration(
            f"stage {name}", "gateway", "internal", meaning, ("meshserve.stage", *attributes)
        )
        for name, meaning, attributes in STAGES
    ),
    SpanDeclaration(
        "decode session",
        "tokenizer",
        "server",
        "One completion's tokens turned into text, on a shared stream.",
        ("meshserve.session.messages", "meshserve.session.tokens", "meshserve.session.cancelled"),
    ),
    SpanDeclaration(
        "check session",
        "safety",
        "server",
        "One completion's text checked, on a shared stream.",
        (
            "meshserve.session.messages",
            "meshserve.session.characters",
            "meshserve.session.cancelled",
            *SAFETY_ATTRIBUTES,
        ),
    ),
    SpanDeclaration(
        "queue",
        "engine",
        "internal",
        "From arrival in the engine to the first step that computed the sequence. One that ended "
        "before its first token has this span alone, as has a request to an encoder that failed.",
        ("meshserve.choice",),
    ),
    SpanDeclaration(
        "prefill",
        "engine",
        "internal",
        "From the first step to the first token.",
        (
            "meshserve.choice",
            "meshserve.engine.prompt_tokens",
            "meshserve.engine.cached_prompt_tokens",
            "meshserve.engine.steps",
        ),
    ),
    SpanDeclaration(
        "decode",
        "engine",
        "internal",
        "From the first token to the last.",
        (
            "meshserve.choice",
            "meshserve.engine.completion_tokens",
            "meshserve.engine.steps",
            "meshserve.engine.preemptions",
        ),
    ),
    SpanDeclaration(
        "encode",
        "engine",
        "internal",
        "From the first batch with an input of the request to the end of the last one.",
        (
            "meshserve.engine.inputs",
            "meshserve.engine.prompt_tokens",
            "meshserve.engine.steps",
        ),
    ),
)

INFERENCE_SPAN = "{operation} {model}"
CLIENT_SPAN = "{package}.{Service}/{Method}"

EVENTS: tuple[EventDeclaration, ...] = (
    EventDeclaration(
        "exception",
        (),
        "Why the span failed: the reason, what it means, its details, and the paths of the fields "
        "that are at fault. The error's own message is left out, for it may quote the request.",
        (
            "exception.type",
            "exception.message",
            "meshserve.error.details",
            "meshserve.error.fields",
        ),
    ),
    EventDeclaration(
        "cancelled",
        (INFERENCE_SPAN, "queue", "prefill", "decode"),
        "The caller gave it up. In the engine also: the gateway found a stop string, or the safety "
        "filter blocked the rest.",
    ),
    EventDeclaration(
        "retried",
        (CLIENT_SPAN,),
        "A replica could not take the call, and another try follows.",
        ("error.type", "server.address", "server.port"),
    ),
    EventDeclaration("first_chunk", (INFERENCE_SPAN,), "The first text was passed on."),
    EventDeclaration(
        "coalescing",
        ("stage look_up",),
        "An equal request is being computed; its answer is waited for.",
    ),
    EventDeclaration("first_token", ("decode",), "The first token was sampled."),
    EventDeclaration(
        "progress",
        ("decode",),
        "How far it is, and how fast since the event before: after 16, 64, 256, ... tokens.",
        ("meshserve.engine.completion_tokens", "meshserve.engine.tokens_per_s"),
    ),
    EventDeclaration(
        "preempted",
        ("prefill", "decode"),
        "The sequence gave its KV blocks to others and went back to the queue. The first 8 times.",
    ),
    EventDeclaration("resumed", ("prefill", "decode"), "It runs again."),
    EventDeclaration(
        "speculation",
        ("decode",),
        "What became of the guesses at tokens ahead.",
        ("meshserve.engine.drafted_tokens", "meshserve.engine.accepted_draft_tokens"),
    ),
)
