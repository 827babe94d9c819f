"""What flows through the request path once generation begins."""

from __future__ import annotations

from dataclasses import dataclass, field

from meshserve.v1 import types_pb2


@dataclass(slots=True)
class TextDelta:
    """Text, and the tokens behind it, that were added to one choice."""

    index: int
    text: str
    token_ids: list[int] = field(default_factory=list)
    logprobs: types_pb2.Logprobs | None = None
    # Whether the end of the choice is the next that comes of it.
    is_last: bool = False


@dataclass(slots=True)
class ChoiceEnd:
    """The end of one choice. Its text came before."""

    index: int
    finish_reason: types_pb2.FinishReason.ValueType
    matched_stop: types_pb2.MatchedStop | None
    usage: types_pb2.Usage
    safety: types_pb2.SafetyVerdict | None = None


Event = TextDelta | ChoiceEnd
