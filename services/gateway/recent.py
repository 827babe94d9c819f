"""The last requests and those in flight: ids, counts and times, never text.

What a record costs is paid once a request, at its end; one in flight is looked at only when someone
asks.
"""

from __future__ import annotations

import itertools
import time
import uuid
from collections import deque

from meshserve.v1 import mesh_pb2
from services.gateway.context import CallContext
from services.gateway.events import ChoiceEnd
from services.gateway.timings import engine_phases
from services.gateway.usage import total_usage

KEPT_REQUESTS = 500
MAX_ID_CHARS = 128
# Of one answer, so that none is large, or long in the making.
MAX_FINISHED = 100
MAX_IN_FLIGHT = 200


class RecentRequests:
    """A ring of finished requests, and the requests in flight."""

    def __init__(self, kept: int = KEPT_REQUESTS) -> None:
        self.instance_id = uuid.uuid4().hex
        self._finished: deque[mesh_pb2.RequestOverview] = deque(maxlen=kept)
        # How many have ended, those included that are not kept any more.
        self._ended = 0
        self._active: dict[int, CallContext] = {}
        self._last_number = 0

    def begin(self, context: CallContext) -> int:
        """Takes note of a request that has arrived; returns its number."""
        self._last_number += 1
        self._active[self._last_number] = context
        return self._last_number

    def end(self, number: int, reason: str) -> None:
        """Records a request that has ended; `reason` is empty for success."""
        context = self._active.pop(number)
        self._finished.append(_record(number, context, reason, in_flight=False))
        self._ended += 1

    def active(self, tenant: str) -> int:
        """How many requests of a tenant are in flight."""
        return sum(context.tenant.name == tenant for context in self._active.values())

    def report(self, cursor: str = "", tenant: str | None = None) -> mesh_pb2.ListRequestsResponse:
        """What has ended since another report gave its `cursor`, and what is in flight; `tenant`
        asks for one's own."""
        oldest = self._ended - len(self._finished)
        seen = max(oldest, self._seen(cursor))
        answer = mesh_pb2.ListRequestsResponse(instance_id=self.instance_id)
        for record in itertools.islice(self._finished, seen - oldest, None):
            if tenant is None or record.tenant == tenant:
                if len(answer.finished) == MAX_FINISHED:
                    answer.has_more = True
                    break
                answer.finished.append(record)
            seen += 1
        answer.cursor = f"{self.instance_id}.{seen}"
        active = [
            entry
            for entry in self._active.items()
            if tenant is None or entry[1].tenant.name == tenant
        ]
        answer.in_flight_total = len(active)
        answer.in_flight.extend(
            _record(*entry, reason="", in_flight=True) for entry in active[:MAX_IN_FLIGHT]
        )
        return answer

    def _seen(self, cursor: str) -> int:
        """How many had ended by then; 0 for the cursor of another process."""
        instance_id, _, count = cursor.partition(".")
        return int(count) if instance_id == self.instance_id and count.isdecimal() else 0


def _record(
    number: int, context: CallContext, reason: str, *, in_flight: bool
) -> mesh_pb2.RequestOverview:
    began = context.arrived_at
    duration_ms = (time.perf_counter() - began) * 1000
    trace = context.span.get_span_context()
    record = mesh_pb2.RequestOverview(
        number=number,
        # A refused request's id may be anything.
        request_id=context.request_id[:MAX_ID_CHARS],
        tenant=context.tenant.name,
        model=context.model.name if context.model is not None else "",
        operation=context.operation,
        streaming=context.streaming,
        duration_ms=duration_ms,
        usage=total_usage(context),
        cached=context.cached,
        reason=reason,
        finish_reasons=dict.fromkeys(end.finish_reason for end in _ends(context)),
        trace_id=f"{trace.trace_id:032x}" if trace.trace_flags.sampled else "",
        in_flight=in_flight,
    )
    record.arrival_time.FromNanoseconds(context.arrived_unix_ns)
    if context.first_text_at is not None:
        record.first_text_ms = (context.first_text_at - began) * 1000
    for name, begin, end in context.stage_times:
        record.stages.add(name=name, begin_ms=(begin - began) * 1000, end_ms=(end - began) * 1000)
    if context.engine_timings:
        _add_engine(record, context)
    return record


def _add_engine(record: mesh_pb2.RequestOverview, context: CallContext) -> None:
    times = context.engine_timings.values()
    record.engine_steps = max(each.steps for each in times)
    record.preemptions = sum(each.preemptions for each in times)
    stages = {stage.name: stage for stage in record.stages}
    if "generate" in stages:
        earliest_ms, latest_ms = stages["generate"].begin_ms, stages["generate"].end_ms
    else:
        earliest_ms = max((stage.end_ms for stage in record.stages), default=0.0)
        latest_ms = record.duration_ms
    phases = [
        (
            name,
            (begin - context.arrived_unix_ns) / 1e6,
            end and (end - context.arrived_unix_ns) / 1e6,
        )
        for name, begin, end in engine_phases(context)
    ]
    if not phases:
        return
    too_late_ms = max(0.0, max(max(begin, end) for _, begin, end in phases) - latest_ms)
    shift_ms = max(-too_late_ms, earliest_ms - phases[0][1])
    for name, begin_ms, end_ms in phases:
        record.engine_phases.add(
            name=name,
            begin_ms=begin_ms + shift_ms,
            end_ms=end_ms + shift_ms if end_ms else latest_ms,
            running=not end_ms and record.in_flight,
        )


def _ends(context: CallContext) -> list[ChoiceEnd]:
    # From the back, so that few of a long answer's thousand deltas are looked at.
    ends: list[ChoiceEnd] = []
    for event in reversed(context.events):
        if isinstance(event, ChoiceEnd):
            ends.append(event)
            if len(ends) == context.choices:
                break
    return ends[::-1]
