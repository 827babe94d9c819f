"""Stages run in order, are left in reverse order whatever happens, and are timed."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing

import pytest
from opentelemetry.trace import INVALID_SPAN, Span

from meshserve.v1 import cache_pb2, gateway_pb2, types_pb2
from services.gateway.context import RequestContext
from services.gateway.events import ChoiceEnd, Event, TextDelta
from services.gateway.pipeline import Pipeline, SideBySide, Stage
from services.runtime import deadline
from services.runtime.errors import Reason, ServiceError
from services.runtime.telemetry import Metrics

STOP = types_pb2.FINISH_REASON_STOP


class Trail:
    """What happened, in order, and the points at which a request can be cut off."""

    def __init__(self, cut_at: int | None = None) -> None:
        self.notes: list[str] = []
        self.errors: dict[str, ServiceError | None] = {}
        self.points = 0
        self._cut_at = cut_at
        self.at_the_point = asyncio.Event()

    async def point(self, note: str) -> None:
        """Waits for ever where the request is to be cut off, else for one turn of the loop."""
        self.points += 1
        if self.points == self._cut_at:
            self.at_the_point.set()
            await asyncio.Event().wait()
        await asyncio.sleep(0)
        self.notes.append(note)


class Noted(Stage):
    """A stage that leaves notes. `fail` raises on the way in."""

    def __init__(self, name: str, trail: Trail, fail: Exception | None = None) -> None:
        self.name = name  # type: ignore[misc]
        self._trail = trail
        self._fail = fail

    async def before(self, context: RequestContext) -> None:
        await self._trail.point(f"+{self.name}")
        if self._fail is not None:
            raise self._fail

    async def after(self, context: RequestContext, error: ServiceError | None) -> None:
        await asyncio.sleep(0)
        self._trail.errors[self.name] = error
        self._trail.notes.append(f"-{self.name}")


class OnReplay(Noted):
    on_replay = True


class Source(Noted):
    async def stream(
        self, context: RequestContext, events: AsyncGenerator[Event], span: Span
    ) -> AsyncGenerator[Event]:
        try:
            for text in ("a", "b"):
                await self._trail.point(f"{self.name}:{text}")
                yield TextDelta(0, text)
            yield ChoiceEnd(0, STOP, None, types_pb2.Usage(completion_tokens=2))
        finally:
            self._trail.notes.append(f"{self.name} closed")


class Doubled(Noted):
    async def stream(
        self, context: RequestContext, events: AsyncGenerator[Event], span: Span
    ) -> AsyncGenerator[Event]:
        try:
            async with aclosing(events):
                async for event in events:
                    await self._trail.point(self.name)
                    if isinstance(event, TextDelta):
                        event.text *= 2
                    yield event
        finally:
            self._trail.notes.append(f"{self.name} closed")


class Cached(Noted):
    async def before(self, context: RequestContext) -> None:
        await super().before(context)
        context.cached_answer = cache_pb2.CachedAnswer(
            chunks=[cache_pb2.CachedChunk(text="kept")], ends=[cache_pb2.CachedEnd()]
        )


def context() -> RequestContext:
    return RequestContext(
        request=gateway_pb2.GenerateRequest(text="x"),
        operation="chat",
        streaming=True,
        metadata={},
        request_id="id",
        span=INVALID_SPAN,
    )


async def run(*steps: Stage | SideBySide) -> tuple[list[Event], Metrics]:
    metrics = Metrics("gateway")
    pipeline = Pipeline(steps, metrics)
    async with aclosing(pipeline.run(context())) as events:
        collected = [event async for event in events]
    await pipeline.drain()
    return collected, metrics


def texts(events: list[Event]) -> list[str]:
    return [event.text for event in events if isinstance(event, TextDelta)]


async def test_ways_in_run_in_order_and_ways_out_in_reverse() -> None:
    trail = Trail()
    events, metrics = await run(
        Noted("one", trail), Source("source", trail), Doubled("double", trail), Noted("two", trail)
    )
    assert texts(events) == ["aa", "bb"]
    assert [note for note in trail.notes if note[0] in "+-"] == [
        *["+one", "+source", "+double", "+two"],
        *["-two", "-double", "-source", "-one"],
    ]
    assert set(trail.errors.values()) == {None}
    for stage in ("one", "source", "double", "two"):
        name = "meshserve_gateway_stage_duration_seconds_count"
        assert metrics.registry.get_sample_value(name, {"stage": stage}) == 1


async def test_a_kept_answer_takes_the_place_of_generation() -> None:
    trail = Trail()
    events, _ = await run(
        Noted("one", trail),
        Cached("cache", trail),
        SideBySide(Noted("x", trail), Noted("y", trail)),
        Source("source", trail),
        OnReplay("settle", trail),
    )
    assert texts(events) == ["kept"]
    assert trail.notes == ["+one", "+cache", "+settle", "-settle", "-cache", "-one"]


@pytest.mark.parametrize("failure", [ServiceError(Reason.RATE_LIMITED, "x"), RuntimeError("x")])
async def test_a_failure_ends_the_request_and_leaves_what_was_entered(failure: Exception) -> None:
    trail = Trail()
    with pytest.raises(type(failure)):
        await run(Noted("one", trail), Noted("two", trail, fail=failure), Source("source", trail))
    assert trail.notes == ["+one", "+two", "-two", "-one"]
    expected = failure.reason if isinstance(failure, ServiceError) else Reason.INTERNAL
    assert {error.reason for error in trail.errors.values() if error} == {expected}


async def test_side_by_side_the_first_failure_ends_the_others() -> None:
    trail = Trail(cut_at=1)
    with pytest.raises(ServiceError) as caught:
        await run(
            SideBySide(
                Noted("endless", trail),
                Noted("wrong", trail, fail=ServiceError(Reason.PROMPT_BLOCKED, "x")),
            )
        )
    assert caught.value.reason is Reason.PROMPT_BLOCKED
    assert trail.notes == ["+wrong", "-wrong", "-endless"]


async def test_a_stage_that_another_has_outdated_runs_again_but_is_left_once() -> None:
    trail = Trail()

    class Changes(Noted):
        async def before(self, context: RequestContext) -> None:
            await super().before(context)
            context.input_version += 1

    class Reads(Noted):
        async def before(self, context: RequestContext) -> None:
            context.tokenized_version = context.input_version
            await super().before(context)

        def is_outdated(self, context: RequestContext) -> bool:
            return context.tokenized_version != context.input_version

    await run(SideBySide(Changes("changes", trail), Reads("reads", trail)))
    assert sorted(trail.notes[:2]) == ["+changes", "+reads"]
    assert trail.notes[2:] == ["+reads", "-reads", "-changes"]


async def test_a_way_out_that_fails_does_not_keep_the_others() -> None:
    trail = Trail()

    class Clumsy(Noted):
        async def after(self, context: RequestContext, error: ServiceError | None) -> None:
            raise RuntimeError("a defect")

    await run(Noted("one", trail), Clumsy("two", trail), Noted("three", trail))
    assert trail.notes[-2:] == ["-three", "-one"]


def whole_path(trail: Trail) -> list[Stage | SideBySide]:
    return [
        Noted("one", trail),
        SideBySide(Noted("left", trail), Noted("right", trail)),
        Source("source", trail),
        Doubled("double", trail),
    ]


async def cut_off(trail: Trail, cut: Callable[[asyncio.Task[object]], object]) -> Pipeline:
    """Runs the whole path and cuts it off at the trail's point."""
    pipeline = Pipeline(whole_path(trail), Metrics("gateway"))

    async def request() -> None:
        async with aclosing(pipeline.run(context())) as events:
            async for _ in events:
                pass

    task: asyncio.Task[object] = asyncio.create_task(request())
    async with asyncio.timeout(5):
        await trail.at_the_point.wait()
        cut(task)
        with pytest.raises(asyncio.CancelledError):
            await task
        await pipeline.drain()
    return pipeline


@pytest.mark.parametrize("times", [1, 3])
async def test_cut_off_anywhere_everything_entered_is_left_once(times: int) -> None:
    whole = Trail()
    await run(*whole_path(whole))
    for point in range(1, whole.points + 1):
        trail = Trail(cut_at=point)

        def cut(task: asyncio.Task[object]) -> None:
            """The first cancellation, and further ones while the ways out run."""
            for _ in range(times):
                task.cancel()
                asyncio.get_running_loop().call_soon(task.cancel)

        pipeline = await cut_off(trail, cut)
        left = [note[1:] for note in trail.notes if note.startswith("-")]
        assert len(left) == len(set(left)), point
        entered = {note[1:] for note in trail.notes if note.startswith("+")}
        assert entered <= set(left), point
        assert {error.reason for error in trail.errors.values() if error} == {Reason.CANCELLED}
        if any(note.startswith("source:") for note in trail.notes):
            assert "source closed" in trail.notes, point
        assert not pipeline._closing


async def test_a_request_cut_off_at_its_deadline_says_so() -> None:
    deadline.set_remaining(0.0)
    trail = Trail(cut_at=1)
    await cut_off(trail, lambda task: task.cancel())
    assert {error.reason for error in trail.errors.values() if error} == {Reason.DEADLINE_EXCEEDED}


async def test_a_reader_that_leaves_in_the_middle_closes_the_source() -> None:
    trail = Trail()
    pipeline = Pipeline(whole_path(trail), Metrics("gateway"))
    async with aclosing(pipeline.run(context())) as events:
        await anext(events)
    assert "source closed" in trail.notes
    assert [note for note in trail.notes if note.startswith("-")] == [
        *["-double", "-source"],
        *[f"-{note[1:]}" for note in reversed(trail.notes[:3])],
    ]
    assert {error.reason for error in trail.errors.values() if error} == {Reason.CANCELLED}
