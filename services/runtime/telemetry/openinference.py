"""What Phoenix groups and colours spans by, beside what it reads from the `gen_ai.*` attributes."""

from __future__ import annotations

from opentelemetry.context import Context
from opentelemetry.sdk.trace import Span, SpanProcessor

KIND = "openinference.span.kind"
# Phoenix takes a span with this attribute for a call of a model, tokens and all, by itself.
_MODEL_CALL = "gen_ai.operation.name"
_GUARDRAILS = ("stage screen", "stage moderate", "check session", "meshserve.v1.SafetyService/")


class OpenInferenceKinds(SpanProcessor):
    """Gives each span its kind in the terms of OpenInference."""

    def on_start(self, span: Span, parent_context: Context | None = None) -> None:
        """Called by the SDK."""
        if span.attributes is None or _MODEL_CALL not in span.attributes:
            guards = span.name.startswith(_GUARDRAILS)
            span.set_attribute(KIND, "GUARDRAIL" if guards else "CHAIN")
