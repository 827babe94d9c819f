"""What a span tells of the safety filter: what was decided and for which categories, never text."""

from __future__ import annotations

from collections.abc import Iterable

from opentelemetry.trace import Span

from meshserve.v1 import types_pb2


def note_verdicts(span: Span, verdicts: Iterable[types_pb2.SafetyVerdict]) -> None:
    """Sets the strongest action of the verdicts, and the categories of all their findings."""
    if not span.is_recording():
        return
    action = types_pb2.SAFETY_ACTION_ALLOW
    categories: set[str] = set()
    for verdict in verdicts:
        action = max(action, verdict.action)
        categories.update(finding.category for finding in verdict.findings)
    name = types_pb2.SafetyAction.Name(action).removeprefix("SAFETY_ACTION_").lower()
    span.set_attribute("meshserve.safety.action", name)
    if categories:
        span.set_attribute("meshserve.safety.categories", sorted(categories))


def note_unchecked(span: Span) -> None:
    """Says that the filter was away, and that text was let past it."""
    span.set_attribute("meshserve.safety.action", "unchecked")
