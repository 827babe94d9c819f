"""What is kept of requests, and how it is told bit by bit."""

from __future__ import annotations

from collections.abc import AsyncIterator

from opentelemetry.trace import INVALID_SPAN

from meshserve.v1 import engine_pb2, gateway_pb2, mesh_pb2, types_pb2
from services.gateway.context import RequestContext
from services.gateway.recent import MAX_FINISHED, RecentRequests
from services.gateway.timings import generation_timings
from tests.fakes.scripted_mesh import EngineRequest, EngineResponse, ScriptedMesh, chunk, complete

MS = 1_000_000


def request(name: str = "a") -> RequestContext:
    return RequestContext(
        request=gateway_pb2.GenerateRequest(),
        operation="chat",
        streaming=False,
        metadata={},
        request_id=name,
        span=INVALID_SPAN,
    )


def ids(answer: mesh_pb2.ListRequestsResponse) -> list[str]:
    return [each.request_id for each in answer.finished]


def test_only_so_many_requests_are_kept() -> None:
    recent = RecentRequests(kept=3)
    for name in "abcde":
        recent.end(recent.begin(request(name)), reason="")
    assert ids(recent.report()) == ["c", "d", "e"]
    assert not recent.report().in_flight


def test_a_cursor_asks_for_what_has_ended_since() -> None:
    recent = RecentRequests()
    first, second = recent.begin(request("a")), recent.begin(request("b"))
    recent.end(second, reason="")
    before = recent.report()
    assert (ids(before), [each.request_id for each in before.in_flight]) == (["b"], ["a"])
    assert ids(recent.report(before.cursor)) == []
    recent.end(first, reason="INTERNAL")
    assert ids(recent.report(before.cursor)) == ["a"], "one that came before and ended after"
    assert ids(RecentRequests().report(before.cursor)) == []
    assert ids(recent.report("another-process.2")) == ["b", "a"]


def test_what_is_much_is_told_in_parts() -> None:
    recent = RecentRequests()
    names = [str(number) for number in range(2 * MAX_FINISHED + 1)]
    for name in names:
        recent.end(recent.begin(request(name)), reason="")
    told, cursor, has_more = [], "", True
    while has_more:
        answer = recent.report(cursor)
        assert len(answer.finished) <= MAX_FINISHED
        told += ids(answer)
        cursor, has_more = answer.cursor, answer.has_more
    assert told == names


def times(context: RequestContext, *after_ms: float) -> engine_pb2.EngineTimings:
    """Queued, scheduled, first token and end, in milliseconds after the request's arrival."""
    marks = [context.arrived_unix_ns + round(each * MS) for each in after_ms]
    marks += [0] * (4 - len(marks))
    return engine_pb2.EngineTimings(
        queued_time_unix_ns=marks[0],
        scheduled_time_unix_ns=marks[1],
        first_token_time_unix_ns=marks[2],
        finished_time_unix_ns=marks[3],
        steps=7,
    )


def phases(context: RequestContext) -> dict[str, tuple[float, float]]:
    recent = RecentRequests()
    recent.end(recent.begin(context), reason="")
    (record,) = recent.report().finished
    return {
        each.name: (round(each.begin_ms, 2), round(each.end_ms, 2)) for each in record.engine_phases
    }


def generated(begin_ms: float, end_ms: float) -> RequestContext:
    """A request that was generated then."""
    context = request()
    began = context.arrived_at
    context.stage_times.append(("generate", began + begin_ms / 1000, began + end_ms / 1000))
    return context


def test_the_engine_tells_where_the_time_went() -> None:
    context = generated(1, 100)
    context.engine_timings[0] = times(context, 2, 12, 42, 98)
    assert phases(context) == {"queue": (2, 12), "prefill": (12, 42), "decode": (42, 98)}
    told = generation_timings(context, 0)
    assert told is not None
    assert (told.queue_ms, told.prefill_ms, told.decode_ms) == (10, 30, 56)
    assert told.steps == 7


def test_choices_are_told_of_as_one_from_the_first_to_the_last() -> None:
    context = generated(0, 100)
    context.engine_timings[0] = times(context, 2, 12, 42, 60)
    context.engine_timings[1] = times(context, 2, 20, 50, 90)
    assert phases(context) == {"queue": (2, 20), "prefill": (12, 50), "decode": (42, 90)}


def test_another_machines_clock_does_not_move_it_out_of_its_stage() -> None:
    for behind_ms in (-5000, 5000):
        context = generated(10, 110)
        context.engine_timings[0] = times(context, *(each + behind_ms for each in (0, 1, 50, 90)))
        told = phases(context)
        assert told["queue"][0] >= 10
        assert told["decode"][1] <= 110
        assert round(told["decode"][1] - told["queue"][0], 1) == 90


def test_a_decode_that_was_ended_from_outside_lasts_to_the_end_of_its_stage() -> None:
    context = generated(0, 100)
    context.engine_timings[0] = times(context, 1, 2, 40)
    assert phases(context)["decode"] == (40, 100)
    told = generation_timings(context, 0)
    assert told is not None
    assert not told.HasField("decode_ms")
    assert told.prefill_ms == 38


def test_an_engine_that_tells_nothing_leaves_nothing_out_of_place() -> None:
    context = generated(0, 100)
    context.engine_timings[0] = engine_pb2.EngineTimings()
    assert phases(context) == {}
    assert generation_timings(context, 0) is None


async def test_a_caller_is_told_how_long_the_engine_worked(mesh: ScriptedMesh) -> None:
    async def script(_: EngineRequest) -> AsyncIterator[EngineResponse]:
        yield chunk((0, b"text"))
        told = engine_pb2.EngineTimings(
            queued_time_unix_ns=1 * MS,
            scheduled_time_unix_ns=3 * MS,
            first_token_time_unix_ns=7 * MS,
            finished_time_unix_ns=15 * MS,
            preemptions=1,
            steps=5,
        )
        yield complete(timings=told)

    mesh.engine.script = script
    expected = types_pb2.GenerationTimings(
        queue_ms=2, prefill_ms=4, decode_ms=8, steps=5, preemptions=1
    )
    answer = await mesh.generate("hello")
    assert answer.choices[0].timings == expected
    *_, last = await mesh.stream("hello")
    assert last.complete.timings == expected
