"""What the cache takes: whole answers under complete keys, and times that make sense."""

from __future__ import annotations

from google.protobuf import duration_pb2

from meshserve.v1 import cache_pb2, types_pb2
from services.cache.keys import EntryKey
from services.cache.leases import LeaseToken
from services.runtime.errors import invalid_field

_KEPT_FINISH_REASONS = frozenset(
    {
        types_pb2.FINISH_REASON_STOP,
        types_pb2.FINISH_REASON_LENGTH,
        types_pb2.FINISH_REASON_TOOL_CALLS,
    }
)
_NANOS_PER_S = 1_000_000_000


def checked_key(key: cache_pb2.CacheKey) -> EntryKey:
    """The entry that a complete key names. Raises ServiceError."""
    if not key.model:
        raise invalid_field("key.model", "is required")
    if not key.request:
        raise invalid_field("key.request", "is required")
    return EntryKey.of(key)


def checked_duration_ms(
    duration: duration_pb2.Duration, path: str, *, at_least_ms: int, at_most_s: float
) -> int:
    """A duration in whole milliseconds, rounded up. Raises ServiceError."""
    if not -_NANOS_PER_S < duration.nanos < _NANOS_PER_S or (duration.seconds * duration.nanos < 0):
        raise invalid_field(path, "is not a valid duration")
    total_ms = duration.seconds * 1000 - (-duration.nanos // 1_000_000)
    if not at_least_ms <= total_ms <= at_most_s * 1000:
        raise invalid_field(path, f"must lie in [{at_least_ms / 1000:g}, {at_most_s:g}] seconds")
    return total_ms


def checked_lease_token(text: str) -> LeaseToken:
    """The token of a lease. Raises ServiceError."""
    try:
        return LeaseToken.parse(text)
    except ValueError as error:
        raise invalid_field("lease_token", "is not a token that LookUp gave") from error


def check_answer(answer: cache_pb2.CachedAnswer) -> None:
    """Raises ServiceError unless the answer is complete, and neither aborted nor filtered."""
    if not answer.ends:
        raise invalid_field("answer.ends", "needs one end per choice")
    seen: set[int] = set()
    for position, end in enumerate(answer.ends):
        path = f"answer.ends[{position}]"
        if end.index >= len(answer.ends):
            raise invalid_field(f"{path}.index", f"must be less than {len(answer.ends)}")
        if end.index in seen:
            raise invalid_field(f"{path}.index", f"choice {end.index} has ended already")
        seen.add(end.index)
        if end.finish_reason not in _KEPT_FINISH_REASONS:
            raise invalid_field(
                f"{path}.finish_reason",
                "only answers that ended with STOP, LENGTH or TOOL_CALLS are kept",
            )
        _check_not_blocked(end.safety, f"{path}.safety")
    _check_not_blocked(answer.prompt_safety, "answer.prompt_safety")
    for position, chunk in enumerate(answer.chunks):
        if chunk.index not in seen:
            raise invalid_field(
                f"answer.chunks[{position}].index", f"choice {chunk.index} has no end"
            )


def _check_not_blocked(verdict: types_pb2.SafetyVerdict, path: str) -> None:
    if verdict.action == types_pb2.SAFETY_ACTION_BLOCK:
        raise invalid_field(f"{path}.action", "a blocked answer is not kept")
