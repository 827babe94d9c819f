"""The table of all spans and their attributes; docs/telemetry.md and a test are held against it.

Attribute names are those of the OpenTelemetry semantic conventions 1.41.1 where they have one
(`rpc.*`, `gen_ai.*`, `error.type`), and `meshserve.*` otherwise. No attribute ever carries text of
a prompt or a completion.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

RPC_ATTRIBUTES = ("rpc.system.name", "rpc.method", "rpc.response.status_code")
ERROR_ATTRIBUTES = ("error.type",)


@dataclass(frozen=True, slots=True)
class SpanDeclaration:
    """One row: a span's name, who makes it, and what it may carry beside `error.type`."""

    name: str
    service: str
    kind: Literal["server", "client", "internal"]
    meaning: str
    attributes: tuple[str, ...] = ()


STAGES = (
    ("authenticate", "Who calls, and whether they may use the model."),
    ("admit", "Rate limit and room for one more request."),
    ("route", "Which model and which engines."),
    ("look_up", "The response cache."),
    ("screen", "The prompt check, side by side with tokenization."),
    ("tokenize", "The prompt's token ids."),
    ("generate", "The engine's tokens, turned into text, stop strings cut."),
    ("moderate", "The completion check."),
    ("settle", "Usage counted, answer kept, limits settled."),
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
        "A call made to another service.",
        (*RPC_ATTRIBUTES, "server.address"),
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
        "An inference request: `chat` or `text_completion`, then the model. Parent of the stages.",
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
            "gen_ai.request.seed",
            "gen_ai.request.stream",
            "gen_ai.request.choice.count",
            "gen_ai.response.finish_reasons",
            "gen_ai.usage.input_tokens",
            "gen_ai.usage.output_tokens",
            "gen_ai.response.time_to_first_chunk",
            "meshserve.tenant",
            "meshserve.cached",
            "meshserve.cancelled",
        ),
    ),
    *(
        SpanDeclaration(f"stage {name}", "gateway", "internal", meaning, ("meshserve.stage",))
        for name, meaning in STAGES
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
            "meshserve.safety.action",
        ),
    ),
    SpanDeclaration(
        "queue",
        "engine",
        "internal",
        "From arrival in the engine to the first step that computed the request.",
        ("meshserve.engine.preemptions",),
    ),
    SpanDeclaration(
        "prefill",
        "engine",
        "internal",
        "From the first step to the first token.",
        ("gen_ai.usage.input_tokens",),
    ),
    SpanDeclaration(
        "decode",
        "engine",
        "internal",
        "From the first token to the last.",
        ("gen_ai.usage.output_tokens",),
    ),
)
