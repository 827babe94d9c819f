"""What a span tells of a safety verdict: what was decided and for which categories, never text."""

from __future__ import annotations

from collections.abc import Iterable

from meshserve.v1 import types_pb2

# A filter that was away and passed by decided nothing.
UNCHECKED: dict[str, str | list[str]] = {"meshserve.safety.action": "unchecked"}


def safety_attributes(
    verdicts: Iterable[types_pb2.SafetyVerdict],
) -> dict[str, str | list[str]]:
    """The strongest action of the verdicts, and the categories of all their findings."""
    action = types_pb2.SAFETY_ACTION_ALLOW
    categories: set[str] = set()
    for verdict in verdicts:
        action = max(action, verdict.action)
        categories.update(finding.category for finding in verdict.findings)
    name = types_pb2.SafetyAction.Name(action).removeprefix("SAFETY_ACTION_").lower()
    attributes: dict[str, str | list[str]] = {"meshserve.safety.action": name}
    if categories:
        attributes["meshserve.safety.categories"] = sorted(categories)
    return attributes
