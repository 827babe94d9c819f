"""The last requests and those in flight: ids, counts and times, never text.

What a record costs is paid once a request, at its end; one in flight is looked at only when someone
asks.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass

from meshserve.v1 import types_pb2
from services.gateway.context import RequestContext
from services.gateway.events import ChoiceEnd
from services.gateway.usage import total_usage

KEPT_REQUESTS = 500
MAX_ID_CHARS = 128


@dataclass(frozen=True, slots=True)
class StageTime:
    """When a stage worked, in seconds after the request's arrival."""

    name: str
    begin_s: float
    end_s: float


@dataclass(frozen=True, slots=True)
class RecentRequest:
    """One request. `model` is empty when it was not routed, `reason` when it did not fail, and
    `trace_id` when its trace is not recorded."""

    number: int
    request_id: str
    tenant: str
    model: str
    operation: str
    streaming: bool
    arrived_unix_ms: int
    duration_s: float
    first_text_s: float | None
    prompt_tokens: int
    cached_prompt_tokens: int
    completion_tokens: int
    cached: bool
    reason: str
    finish_reasons: tuple[str, ...]
    stages: tuple[StageTime, ...]
    trace_id: str
    in_flight: bool


class RecentRequests:
    """A ring of finished requests, and the requests in flight."""

    def __init__(self, kept: int = KEPT_REQUESTS) -> None:
        self._finished: deque[RecentRequest] = deque(maxlen=kept)
        self._active: dict[int, RequestContext] = {}
        self._last_number = 0

    def begin(self, context: RequestContext) -> int:
        """Takes note of a request that has arrived; returns its number."""
        self._last_number += 1
        self._active[self._last_number] = context
        return self._last_number

    def end(self, number: int, reason: str) -> None:
        """Records a request that has ended; `reason` is empty for success."""
        context = self._active.pop(number)
        self._finished.append(_record(number, context, reason, in_flight=False))

    def finished(self, tenant: str | None = None) -> list[RecentRequest]:
        """Requests that have ended, in the order of their ends; `tenant` asks for one's own."""
        return _of_tenant(self._finished, tenant)

    def in_flight(self, tenant: str | None = None) -> list[RecentRequest]:
        """Requests that have not ended, as far as they have come."""
        return _of_tenant(
            (_record(*entry, reason="", in_flight=True) for entry in self._active.items()), tenant
        )


def _of_tenant(records: Iterable[RecentRequest], tenant: str | None) -> list[RecentRequest]:
    return [record for record in records if tenant is None or record.tenant == tenant]


def _record(number: int, context: RequestContext, reason: str, *, in_flight: bool) -> RecentRequest:
    usage = total_usage(context)
    began = context.arrived_at
    trace = context.span.get_span_context()
    return RecentRequest(
        number=number,
        # A refused request's id may be anything.
        request_id=context.request_id[:MAX_ID_CHARS],
        tenant=context.tenant.name,
        model=context.model.name if context.model is not None else "",
        operation=context.operation,
        streaming=context.streaming,
        arrived_unix_ms=context.arrived_unix_ns // 1_000_000,
        duration_s=time.perf_counter() - began,
        first_text_s=None if context.first_text_at is None else context.first_text_at - began,
        prompt_tokens=usage.prompt_tokens,
        cached_prompt_tokens=usage.cached_prompt_tokens,
        completion_tokens=usage.completion_tokens,
        cached=context.cached_answer is not None,
        reason=reason,
        finish_reasons=tuple(
            types_pb2.FinishReason.Name(event.finish_reason).removeprefix("FINISH_REASON_").lower()
            for event in _ends(context)
        ),
        stages=tuple(
            StageTime(name, begin - began, end - began) for name, begin, end in context.stage_times
        ),
        trace_id=f"{trace.trace_id:032x}" if trace.trace_flags.sampled else "",
        in_flight=in_flight,
    )


def _ends(context: RequestContext) -> list[ChoiceEnd]:
    # From the back, so that few of a long answer's thousand deltas are looked at.
    ends: list[ChoiceEnd] = []
    for event in reversed(context.events):
        if isinstance(event, ChoiceEnd):
            ends.append(event)
            if len(ends) == context.choices:
                break
    return ends[::-1]
