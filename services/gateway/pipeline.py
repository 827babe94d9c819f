"""The request path: an ordered list of named stages, each a span.

A stage may work before generation (`before`), on what is generated (`stream`), and after
everything (`after`, which always runs, for the stages that were entered, in reverse order). Once a
stage has set `cached_answer` that answer is replayed instead of generated, and stages that are
about generation are left out.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncGenerator, Awaitable, Coroutine, Mapping, Sequence
from contextlib import aclosing
from typing import Any, ClassVar, Generic, TypeVar

from opentelemetry.trace import Span, Tracer
from prometheus_client import Histogram

from services.gateway.context import CallContext, RequestContext
from services.gateway.events import ChoiceEnd, Event
from services.gateway.replay import replay
from services.runtime import deadline
from services.runtime.errors import Reason, ServiceError
from services.runtime.server_calls import DEADLINE_TOLERANCE_S
from services.runtime.telemetry import Metrics, get_tracer
from services.runtime.telemetry.tracing import in_span, mark_failed

log = logging.getLogger(__name__)


# The kind of request that a stage works on.
Context = TypeVar("Context", bound=CallContext, contravariant=True)


class Step(Generic[Context]):
    """One step of the request path. All methods may raise ServiceError but `after`."""

    name: ClassVar[str]
    # Whether the stage is entered for an answer that is replayed from the cache as well.
    on_replay: ClassVar[bool] = False

    async def before(self, context: Context) -> None:
        """Runs on the way in, with the stage's span as the current one."""

    def waits(self, context: Context) -> bool:
        """Whether `before` may have to wait for another service; else it runs ahead of the stages
        beside it."""
        return True

    def is_outdated(self, context: Context) -> bool:
        """Whether a stage beside this one has changed what `before` worked on; it then runs again,
        alone."""
        return False

    def stream(
        self, context: Context, events: AsyncGenerator[Event], span: Span
    ) -> AsyncGenerator[Event]:
        """What becomes of the events; the default lets them pass. Async generators that take over
        `events` must exhaust or close them."""
        return events

    def after(self, context: Context, error: ServiceError | None) -> Awaitable[None] | None:
        """Runs once at the end, whatever happened; `error` is None after success. A cancelled
        request ends with reason CANCELLED or DEADLINE_EXCEEDED. May be a coroutine function; what
        there is to wait for is waited for even if the caller has left."""
        return None

    @classmethod
    def transforms_stream(cls) -> bool:
        """Whether the stage works on what is generated."""
        return cls.stream is not Step.stream


class Stage(Step[RequestContext]):
    """A step of the path of completions."""


class SideBySide(Generic[Context]):
    """Stages whose ways in run at the same time, as if none changed what another works on: one that
    is outdated at the end runs again. The first error ends the others."""

    def __init__(self, *stages: Step[Context]) -> None:
        self.stages = stages


async def _nothing() -> AsyncGenerator[Event]:
    empty: tuple[Event, ...] = ()
    for event in empty:
        yield event


class Pipeline(Generic[Context]):
    """Runs requests through the stages."""

    def __init__(
        self, steps: Sequence[Step[Context] | SideBySide[Context]], metrics: Metrics
    ) -> None:
        self._steps = steps
        self._tracer = get_tracer()
        durations = metrics.histogram("meshserve_gateway_stage_duration_seconds")
        stages = [
            stage
            for step in steps
            for stage in (step.stages if isinstance(step, SideBySide) else (step,))
        ]
        self._durations = {stage.name: durations.labels(stage.name) for stage in stages}
        # Ways out that outlive a cancelled call; held so that they are not collected.
        self._closing: set[asyncio.Task[None]] = set()

    async def run(self, context: Context) -> AsyncGenerator[Event]:
        """Yields the events of a request. Raises ServiceError."""
        passage = _Passage(context, self._tracer, self._durations)
        error: ServiceError | None = None
        try:
            for step in self._steps:
                await passage.enter(step)
            async with aclosing(passage.compose()) as events:
                async for event in events:
                    context.events.append(event)
                    if _has_text(event):
                        _note_time(context, event)
                    yield event
        except ServiceError as failure:
            error = failure
            raise
        except (asyncio.CancelledError, GeneratorExit):
            error = departure()
            raise
        except Exception as failure:
            error = ServiceError(Reason.INTERNAL, str(failure))
            raise
        finally:
            passage.end_spans(error)
            rest = passage.leave(error)
            if rest is not None:
                closing = asyncio.create_task(rest)
                self._closing.add(closing)
                closing.add_done_callback(self._closing.discard)
                # Cancelled or not, the ways out run to their end.
                await asyncio.shield(closing)

    async def drain(self) -> None:
        """Waits for the ways out of requests that are gone."""
        while self._closing:
            await asyncio.wait(self._closing)


def departure() -> ServiceError:
    """Why a request ends that is cancelled from outside."""
    remaining_s = deadline.remaining_s()
    if remaining_s is not None and remaining_s <= DEADLINE_TOLERANCE_S:
        return ServiceError(Reason.DEADLINE_EXCEEDED, "the deadline passed")
    return ServiceError(Reason.CANCELLED, "the caller went away")


def _has_text(event: Event) -> bool:
    return isinstance(event, ChoiceEnd) or bool(event.text)


def _note_time(context: CallContext, event: Event) -> None:
    """Remembers when text was passed on to the caller, and counts how long after the text before it
    that was: as it goes, since an answer may go on for many minutes."""
    now = time.perf_counter()
    if context.first_text_at is None:
        context.first_text_at = now
        context.span.add_event("first_chunk")
    if isinstance(event, ChoiceEnd) or context.text_intervals is None:
        return
    before = context.text_at.get(event.index)
    if before is not None:
        context.text_intervals.observe(now - before)
    context.text_at[event.index] = now


class _Passage(Generic[Context]):
    """One request on its way through the stages."""

    def __init__(
        self, context: Context, tracer: Tracer, durations: Mapping[str, Histogram]
    ) -> None:
        self._context = context
        self._tracer = tracer
        self._durations = durations
        self._entered: list[Step[Context]] = []
        self._open_spans: list[tuple[Step[Context], Span, float]] = []

    async def enter(self, step: Step[Context] | SideBySide[Context]) -> None:
        """Runs the way in of a stage, or of several at the same time."""
        if isinstance(step, Step):
            if self._context.cached_answer is None or step.on_replay:
                await self._enter(step)
            return
        if self._context.cached_answer is not None:
            return
        waiting: list[Step[Context]] = []
        for stage in step.stages:
            if stage.waits(self._context):
                waiting.append(stage)
            else:
                await self._enter(stage)
        if len(waiting) == 1:
            await self._enter(waiting[0])
        else:
            await self._enter_together(waiting)
        for stage in step.stages:
            if stage.is_outdated(self._context):
                self._end(*await self._work(stage), None)

    def compose(self) -> AsyncGenerator[Event]:
        """The events of the answer, through the streams of the stages that were entered."""
        if self._context.cached_answer is not None:
            return replay(self._context.cached_answer)
        events = _nothing()
        for stage, span, _ in self._open_spans:
            events = stage.stream(self._context, events, span)
        return events

    def end_spans(self, error: ServiceError | None) -> None:
        """Ends the spans of the stages that worked on the stream."""
        for stage, span, started in self._open_spans:
            self._end(stage, span, started, error)

    def leave(self, error: ServiceError | None) -> Coroutine[Any, Any, None] | None:
        """Runs the ways out; returns the rest of them where there is something to wait for."""
        while self._entered:
            stage = self._entered.pop()
            try:
                rest = stage.after(self._context, error)
            except Exception:
                log.exception("the way out of a stage failed", extra={"stage": stage.name})
            else:
                if rest is not None:
                    return self._leave_slowly(stage, rest, error)
        return None

    async def _leave_slowly(
        self, stage: Step[Context], rest: Awaitable[None], error: ServiceError | None
    ) -> None:
        try:
            await rest
        except Exception:
            log.exception("the way out of a stage failed", extra={"stage": stage.name})
        others = self.leave(error)
        if others is not None:
            await others

    async def _enter_together(self, stages: list[Step[Context]]) -> None:
        try:
            async with asyncio.TaskGroup() as group:
                for stage in stages:
                    group.create_task(self._enter(stage))
        except BaseExceptionGroup as failures:
            raise first_error(failures) from None

    async def _enter(self, stage: Step[Context]) -> None:
        # Entered even if it fails: what it has taken by then is given back on its way out.
        self._entered.append(stage)
        entry = await self._work(stage)
        if stage.transforms_stream() and self._context.cached_answer is None:
            self._open_spans.append(entry)
        else:
            self._end(*entry, None)

    async def _work(self, stage: Step[Context]) -> tuple[Step[Context], Span, float]:
        """The way in of a stage under a span, which is left open unless it fails."""
        started = time.perf_counter()
        span = self._context.span
        # What belongs to a span that is not recorded is not recorded either.
        if span.is_recording():
            span = self._tracer.start_span(
                f"stage {stage.name}", attributes={"meshserve.stage": stage.name}
            )
        try:
            with in_span(span):
                await stage.before(self._context)
        except BaseException as failure:
            self._end(stage, span, started, _as_service_error(failure))
            raise
        return stage, span, started

    def _end(
        self, stage: Step[Context], span: Span, started: float, error: ServiceError | None
    ) -> None:
        now = time.perf_counter()
        self._context.stage_times.append((stage.name, started, now))
        self._durations[stage.name].observe(now - started)
        # A stage that others' failure ended, or a caller who left, is no failure of its own.
        if error is not None and error.reason is not Reason.CANCELLED:
            mark_failed(span, error)
        span.end()


def _as_service_error(failure: BaseException) -> ServiceError:
    if isinstance(failure, ServiceError):
        return failure
    if isinstance(failure, Exception):
        return ServiceError(Reason.INTERNAL, str(failure))
    return departure()


def first_error(group: BaseExceptionGroup[BaseException]) -> BaseException:
    """The first error of a group, for callers who get one."""
    first = group.exceptions[0]
    return first_error(first) if isinstance(first, BaseExceptionGroup) else first
