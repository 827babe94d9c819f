"""How long the engine worked, from the times that it tells of its choices."""

from __future__ import annotations

from collections.abc import Iterator

from meshserve.v1 import engine_pb2, types_pb2
from services.gateway.context import CallContext


def generation_timings(context: CallContext, index: int) -> types_pb2.GenerationTimings | None:
    """Those of one choice, for the caller; None where the engine has told nothing of it."""
    times = context.engine_timings.get(index)
    if times is None or not times.queued_time_unix_ns:
        return None
    timings = types_pb2.GenerationTimings(preemptions=times.preemptions)
    if times.finished_time_unix_ns:
        timings.steps = times.steps
    for name, begin_ns, end_ns in _phases(times):
        if end_ns:
            setattr(timings, f"{name}_ms", (end_ns - begin_ns) / 1e6)
    return timings


def engine_phases(context: CallContext) -> Iterator[tuple[str, int, int]]:
    """(`queue`, `prefill` or `decode`, begin, end) in nanoseconds since the Unix epoch by the
    engine's clock, from when the first choice of the request came into each until the last one left
    it; the end of one under way is 0."""
    phases = [_phases(times) for times in context.engine_timings.values()]
    for choices in zip(*phases, strict=True):
        begins = [begin_ns for _, begin_ns, _ in choices if begin_ns]
        ends = [end_ns for _, _, end_ns in choices]
        if begins:
            yield choices[0][0], min(begins), max(ends) if all(ends) else 0


def _phases(times: engine_pb2.EngineTimings) -> list[tuple[str, int, int]]:
    """The same of one choice; the begin of one that lies ahead is 0, too."""
    marks = (
        times.queued_time_unix_ns,
        times.scheduled_time_unix_ns,
        times.first_token_time_unix_ns,
        times.finished_time_unix_ns,
    )
    return list(zip(("queue", "prefill", "decode"), marks, marks[1:], strict=False))
