"""Equal requests are computed once; nothing is kept that may not be, and no lease is lost."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from pathlib import Path

import grpc
import pytest

from meshserve.v1 import gateway_pb2, safety_pb2, types_pb2
from services.gateway import policy
from services.gateway.policy import PolicyWatch
from services.runtime.errors import Reason, ServiceError
from tests.fakes.scripted_mesh import (
    EngineRequest,
    EngineResponse,
    ScriptedMesh,
    chunk,
    complete,
    encode,
    generation,
    says,
)
from tests.support.errors import failure_of
from tests.support.waiting import until


@pytest.fixture
async def mesh(tmp_path: Path) -> AsyncIterator[ScriptedMesh]:
    async with ScriptedMesh(
        tmp_path, cache={"enabled": True}, safety={"when_unavailable": "allow"}
    ) as started:
        yield started


async def greedy(mesh: ScriptedMesh, text: str = "hello", **fields: object) -> object:
    return await mesh.generate(text, temperature=0, **fields)


async def test_the_second_equal_request_is_answered_by_the_first(mesh: ScriptedMesh) -> None:
    first, second = await greedy(mesh), await greedy(mesh)
    assert (first.cached, second.cached) == (False, True)
    assert second.choices == first.choices
    assert second.usage == first.usage
    assert len(mesh.engine.requests) == 1
    assert len(mesh.cache.look_ups) == 2, "one question each where nobody computes"


async def test_equal_requests_at_once_are_computed_once(
    mesh: ScriptedMesh, monkeypatch: pytest.MonkeyPatch
) -> None:
    # However long they are kept waiting, none gives the cache up and computes by itself.
    monkeypatch.setattr("services.gateway.stages.look_up.BACKEND_TIMEOUT_S", 60)

    async def once_all_have_asked(request: EngineRequest) -> AsyncIterator[EngineResponse]:
        yield chunk((0, encode("one")))
        await until(lambda: len(mesh.cache.look_ups) >= 50)
        yield complete()

    mesh.engine.script = once_all_have_asked
    answers = await asyncio.gather(
        *(mesh.stub.Generate(generation(temperature=0), timeout=120) for _ in range(50))
    )
    assert len(mesh.engine.requests) == 1
    assert sum(not answer.cached for answer in answers) == 1
    assert {answer.choices[0].text for answer in answers} == {"one"}
    assert not mesh.cache.leases


async def test_a_request_that_fails_lets_the_next_one_compute(mesh: ScriptedMesh) -> None:
    async def fails(request: EngineRequest) -> AsyncIterator[EngineResponse]:
        yield chunk((0, encode("one")))
        raise ServiceError(Reason.SEQUENCE_FAILED, "NaN")

    mesh.engine.script = fails
    with pytest.raises(grpc.RpcError) as error:
        await greedy(mesh)
    assert failure_of(error.value).reason == "SEQUENCE_FAILED"
    await until(lambda: not mesh.cache.leases)
    assert not mesh.cache.answers
    mesh.engine.script = says("two")
    assert (await greedy(mesh)).choices[0].text == "two"


async def test_a_caller_that_leaves_before_its_lease_has_come_gives_it_back(
    mesh: ScriptedMesh,
) -> None:
    mesh.cache.may_answer.clear()
    call = mesh.stub.Generate(generation(temperature=0))
    await until(lambda: len(mesh.cache.look_ups) == 1)
    call.cancel()
    await asyncio.sleep(0.05)
    mesh.cache.may_answer.set()
    await until(lambda: bool(mesh.cache.look_ups) and not mesh.cache.leases)
    assert not (await greedy(mesh)).cached
    assert len(mesh.cache.look_ups) == 2, "nobody was waited for"


async def test_a_cache_that_hangs_costs_two_seconds_at_most(
    mesh: ScriptedMesh, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("services.gateway.stages.look_up.BACKEND_TIMEOUT_S", 0.3)
    mesh.cache.may_answer.clear()
    started = time.monotonic()
    assert (await greedy(mesh)).choices[0].text == "onetwo"
    assert time.monotonic() - started < 10, "the request itself has 20 s"
    mesh.cache.may_answer.set()


async def test_an_answer_that_the_cache_refuses_costs_no_lease(mesh: ScriptedMesh) -> None:
    mesh.cache.refuses_stores = True
    assert not (await greedy(mesh)).cached
    assert not mesh.cache.leases


async def test_what_passed_the_filter_by_is_not_kept(mesh: ScriptedMesh) -> None:
    await greedy(mesh, "the policy is known from here on")
    await mesh.kill("safety")
    assert (await greedy(mesh, "unchecked")).choices[0].text == "onetwo"
    assert len(mesh.cache.answers) == 1
    assert not mesh.cache.leases
    await mesh.start("safety")


async def test_filtered_answers_are_not_kept(mesh: ScriptedMesh) -> None:
    mesh.engine.script = says("please stop here, one", " and two")
    answer = await greedy(mesh)
    assert answer.choices[0].finish_reason == types_pb2.FINISH_REASON_CONTENT_FILTER
    assert not mesh.cache.answers
    assert not mesh.cache.leases


async def test_a_redacted_prompt_is_found_again_with_its_verdict(mesh: ScriptedMesh) -> None:
    first, second = [await greedy(mesh, "a badger") for _ in range(2)]
    assert second.cached
    assert second.prompt_safety == first.prompt_safety
    assert second.prompt_safety.action == types_pb2.SAFETY_ACTION_REDACT


async def test_cache_control_is_followed(mesh: ScriptedMesh) -> None:
    async def ask(**control: object) -> gateway_pb2.GenerateResponse:
        request = generation(temperature=0)
        request.cache_control.MergeFrom(types_pb2.CacheControl(**control))  # type: ignore[arg-type]
        return await mesh.stub.Generate(request, timeout=10)

    await ask(no_store=True)
    assert not mesh.cache.answers
    await ask(no_cache=True)
    assert len(mesh.cache.look_ups) == 1
    await ask()
    assert (await ask(no_store=True)).cached
    assert not (await ask(no_cache=True)).cached


async def test_a_gateway_learns_of_a_new_policy_without_asking_for_checks(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(policy, "ASK_INTERVAL_S", 0.01)
    answers: list[str | None] = ["one"]

    class Filter:
        async def GetPolicy(self, request: object, timeout: float) -> object:
            if answers[0] is None:
                raise ServiceError(Reason.SERVICE_UNAVAILABLE, "away")
            return safety_pb2.GetPolicyResponse(revision=answers[0])

    watch = PolicyWatch(Filter(), enabled=True)  # type: ignore[arg-type]
    answers[0] = None
    assert await watch.revision() is None, "what is not known is not guessed"
    answers[0] = "one"
    assert await watch.revision() == "one"
    watch.start()
    answers[0] = "two"
    await asyncio.sleep(0.1)
    assert await watch.revision() == "two"
    answers[0] = None
    await asyncio.sleep(0.05)
    assert await watch.revision() == "two", "a filter that is away has not changed its mind"
    watch.stop()
    assert await PolicyWatch(Filter(), enabled=False).revision() == policy.NO_POLICY  # type: ignore[arg-type]
