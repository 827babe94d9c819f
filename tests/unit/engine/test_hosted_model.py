"""A model comes into memory and leaves it, whoever asks for what, in whatever order."""

from __future__ import annotations

import asyncio
import os
import uuid
from collections.abc import Awaitable
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from services.engine.core.messages import ModelFacts
from services.engine.core_client import CoreStartError
from services.engine.hosted_model import HostedModel, State
from services.engine.hosting import Hosting
from services.engine.request_stream import CoreUnavailableError
from services.engine.waiting import WaitingRequests
from services.runtime.errors import Reason, ServiceError
from tests.support.virtual_time import in_virtual_time

FACTS = ModelFacts("llama", 1, 1, 1, 64, (), "bfloat16", "cpu", 16, 1, 0, 0.0)
LOAD_S = 1.0


class Request:
    """One that is in flight in a core."""

    def __init__(self) -> None:
        self.was_aborted = False
        self.over = asyncio.Event()


class Client:
    """Stands for the core client: takes a second to load, and to end."""

    def __init__(self, *, fails: bool = False) -> None:
        self.fails = fails
        self.facts: ModelFacts | None = None
        self.core_pid = None
        self.draining = False
        self.idle_since_s = 0.0
        self.starts = 0
        self.is_running = False
        self.is_ending = False
        self.in_flight: list[Request] = []
        self._starting: asyncio.Future[None] | None = None

    async def start(self) -> None:
        assert not self.is_running, "there are two cores"
        assert not self.is_ending, "there are two cores"
        assert self._starting is None, "there are two cores"
        self.starts += 1
        loop = asyncio.get_running_loop()
        self._starting = loop.create_future()
        timer = loop.call_later(LOAD_S, lambda: self._ready())
        try:
            await self._starting
        finally:
            timer.cancel()
            self._starting = None

    def _ready(self) -> None:
        assert self._starting is not None
        if self._starting.done():
            return
        if self.fails:
            self._starting.set_exception(CoreStartError("the file is damaged"))
            return
        self.is_running, self.draining, self.facts = True, False, FACTS
        self.idle_since_s = asyncio.get_running_loop().time()
        self._starting.set_result(None)

    async def close(self) -> None:
        if self._starting is not None and not self._starting.done():
            self._starting.set_exception(CoreStartError("it was ended"))
        was_running, self.is_running = self.is_running, False
        for request in self.in_flight:
            request.over.set()
        self.in_flight = []
        if was_running:
            self.is_ending = True
            await asyncio.sleep(LOAD_S)
            self.is_ending = False

    async def drain(self, timeout_s: float) -> int:
        self.draining = True
        try:
            async with asyncio.timeout(timeout_s):
                while self.in_flight:
                    await self.in_flight[0].over.wait()
        except TimeoutError:
            for request in self.in_flight:
                request.was_aborted = True
                request.over.set()
            self.in_flight = []
        return 0

    def check_health(self) -> None:
        if not self.is_running or self.draining:
            raise CoreUnavailableError("the core starts")

    async def answer(self, duration_s: float) -> bool:
        """Works on a request; returns whether it came to its end."""
        self.check_health()
        request = Request()
        self.in_flight.append(request)
        try:
            async with asyncio.timeout(duration_s):
                await request.over.wait()
            return False
        except TimeoutError:
            return True
        finally:
            request.over.set()
            if request in self.in_flight:
                self.in_flight.remove(request)
            self.idle_since_s = asyncio.get_running_loop().time()


def hosted(client: Client, **options: Any) -> HostedModel:
    return HostedModel("m", client, **options)  # type: ignore[arg-type]


async def ask(
    model: HostedModel,
    duration_s: float = 0.1,
    request_id: str | None = None,
    waiting: WaitingRequests | None = None,
) -> bool:
    """A request as the engine takes it."""
    waiting = WaitingRequests() if waiting is None else waiting
    await waiting.wait(request_id or uuid.uuid4().hex, model)
    model.check_ready()
    client: Any = model.client
    answered: bool = await client.answer(duration_s)
    return answered


async def refusal(call: Awaitable[Any]) -> Reason:
    with pytest.raises(ServiceError) as raised:
        await call
    return raised.value.reason


@in_virtual_time
async def test_requests_wake_a_model_once_and_all_get_their_answers() -> None:
    client = Client()
    model = hosted(client, state=State.SLEEPING)
    answers = await asyncio.gather(*(ask(model) for _ in range(50)))
    assert answers == [True] * 50
    assert client.starts == 1


@in_virtual_time
async def test_who_goes_away_while_a_model_wakes_takes_it_from_nobody() -> None:
    client = Client()
    model = hosted(client, state=State.SLEEPING)
    first, second = (asyncio.create_task(ask(model)) for _ in range(2))
    await asyncio.sleep(LOAD_S / 2)
    first.cancel()
    assert await second
    assert client.starts == 1
    assert model.num_requests == 0


@in_virtual_time
async def test_a_model_goes_on_waking_when_nobody_waits_any_more() -> None:
    model = hosted(Client(), state=State.SLEEPING)
    asking = asyncio.create_task(ask(model))
    await asyncio.sleep(LOAD_S / 2)
    asking.cancel()
    await asyncio.sleep(LOAD_S)
    assert model.state is State.READY


@in_virtual_time
async def test_who_waits_for_a_model_can_be_aborted_by_its_id() -> None:
    model, waiting = hosted(Client(), state=State.SLEEPING), WaitingRequests()
    first, second = (
        asyncio.create_task(ask(model, request_id=name, waiting=waiting)) for name in "ab"
    )
    await asyncio.sleep(LOAD_S / 2)
    assert await refusal(ask(model, request_id="a", waiting=waiting)) is Reason.REQUEST_ID_IN_USE
    assert waiting.abort("a")
    assert await refusal(first) is Reason.ABORTED
    assert not waiting.abort("a")
    assert await second
    assert not waiting.abort("b")


@in_virtual_time
async def test_a_model_that_works_is_not_put_to_sleep() -> None:
    model = hosted(Client())
    await model.load()
    asking = asyncio.create_task(ask(model, 5.0))
    await asyncio.sleep(1.0)
    assert await refusal(model.sleep()) is Reason.MODEL_BUSY
    assert await asking
    await model.sleep()
    assert model.state is State.SLEEPING


@in_virtual_time
async def test_requests_that_come_while_a_model_falls_asleep_wake_it_again() -> None:
    client = Client()
    model = hosted(client)
    await model.load()
    sleeping = asyncio.create_task(model.sleep())
    await asyncio.sleep(LOAD_S / 2)
    assert await ask(model)
    await sleeping
    assert client.starts == 2


@in_virtual_time
async def test_an_idle_model_falls_asleep_by_itself_and_a_busy_one_does_not() -> None:
    model = hosted(Client(), sleep_after_s=10.0)
    await model.load()
    for _ in range(5):
        await asyncio.sleep(9.0)
        assert await ask(model)
    assert await ask(model, 60.0)
    assert model.state is State.READY
    await asyncio.sleep(11.0)
    assert model.state is State.SLEEPING


@in_virtual_time
async def test_unloading_waits_for_what_is_in_flight_and_then_aborts_it() -> None:
    model = hosted(Client())
    await model.load()
    short, long = (asyncio.create_task(ask(model, each)) for each in (2.0, 50.0))
    await asyncio.sleep(1.0)
    unloading = asyncio.create_task(model.unload(timeout_s=5.0))
    await asyncio.sleep(0.1)
    assert model.state is State.DRAINING
    assert await refusal(ask(model)) is Reason.DRAINING
    assert await unloading == 1
    assert await short
    assert not await long
    assert await refusal(ask(model)) is Reason.MODEL_NOT_LOADED


@in_virtual_time
async def test_unloading_ends_a_load_at_once() -> None:
    model = hosted(Client())
    loading = asyncio.create_task(model.load())
    await asyncio.sleep(LOAD_S / 4)
    assert await refusal(ask(model)) is Reason.MODEL_LOADING
    async with asyncio.timeout(LOAD_S / 4):
        await model.unload(timeout_s=5.0)
    assert await refusal(loading) is Reason.MODEL_NOT_LOADED
    assert model.state is State.UNLOADED
    assert not model.problem


@in_virtual_time
async def test_a_load_that_fails_says_why_and_may_be_tried_again() -> None:
    client = Client(fails=True)
    model = hosted(client, state=State.SLEEPING)
    asked = await asyncio.gather(*(refusal(ask(model)) for _ in range(20)))
    assert set(asked) == {Reason.MODEL_NOT_LOADED}
    assert client.starts == 1
    assert (model.state, "the file is damaged" in model.problem) == (State.FAILED, True)
    client.fails = False
    await model.load()
    assert not model.problem
    assert await ask(model)


@in_virtual_time
async def test_draining_ends_what_wakes_and_wakes_nothing() -> None:
    asleep, waking = (hosted(Client(), state=State.SLEEPING) for _ in range(2))
    asking = asyncio.create_task(ask(waking))
    await asyncio.sleep(LOAD_S / 2)
    async with asyncio.timeout(LOAD_S / 4):
        await Hosting([asleep]).drain(5.0)
        await waking.drain(5.0)
    assert await refusal(asking) is Reason.DRAINING
    assert await refusal(ask(asleep)) is Reason.DRAINING


OPERATIONS = ("load", "unload", "sleep", "ask", "abort", "leave", "wait")
REFUSALS = {
    Reason.MODEL_NOT_LOADED,
    Reason.MODEL_LOADING,
    Reason.MODEL_BUSY,
    Reason.DRAINING,
    Reason.ABORTED,
}


@given(
    st.lists(
        st.tuples(st.sampled_from(OPERATIONS), st.sampled_from((0.0, 0.01, 0.3, 1.0, 3.0))),
        max_size=40,
    ),
    st.sampled_from((None, 0.5)),
    st.sampled_from((State.UNLOADED, State.SLEEPING)),
)
@in_virtual_time
async def test_storms_leave_a_model_in_a_state_that_is_true(
    operations: list[tuple[str, float]], sleep_after_s: float | None, begins: State
) -> None:
    client = Client()
    model, waiting = hosted(client, state=begins, sleep_after_s=sleep_after_s), WaitingRequests()
    tasks: list[asyncio.Task[Any]] = []
    for operation, duration_s in operations:
        match operation:
            case "load":
                tasks.append(asyncio.create_task(model.load()))
            case "unload":
                tasks.append(asyncio.create_task(model.unload(duration_s)))
            case "sleep":
                tasks.append(asyncio.create_task(model.sleep()))
            case "ask":
                name = str(len(tasks))
                tasks.append(asyncio.create_task(ask(model, duration_s, name, waiting)))
            case "abort":
                waiting.abort(str(len(tasks) - 1))
            case "leave" if tasks:
                tasks[-1].cancel()
            case _:
                await asyncio.sleep(duration_s)
    for result in await asyncio.gather(*tasks, return_exceptions=True):
        if isinstance(result, ServiceError):
            assert result.reason in REFUSALS
        else:
            assert not isinstance(result, Exception), repr(result)
    # What nobody waits for any more comes to its end.
    await asyncio.sleep(60.0)
    assert model.num_requests == 0
    assert client.is_running == (model.state is State.READY)
    assert model.state in (State.READY, State.SLEEPING, State.UNLOADED)
    assert model.state is not State.READY or sleep_after_s is None
    await model.load()
    assert await ask(model)
    await model.close()
    assert not client.is_running


@in_virtual_time
async def test_one_model_that_is_unwell_leaves_the_engine_to_the_others() -> None:
    well, failing, asleep = Client(), Client(fails=True), Client()
    models = [
        HostedModel(name, client, state=state)  # type: ignore[arg-type]
        for name, client, state in (
            ("failing", failing, State.UNLOADED),
            ("well", well, State.UNLOADED),
            ("asleep", asleep, State.SLEEPING),
        )
    ]
    hosting = Hosting(models)
    await hosting.start(["failing", "well"])
    assert [model.state.value for model in models] == ["failed", "ready", "sleeping"]
    hosting.check_health()
    Hosting(models[::2]).check_health()
    with pytest.raises(ServiceError):
        Hosting(models[:1]).check_health()
    well.is_running = False
    with pytest.raises(ServiceError):
        Hosting(models[:2]).check_health()
    await models[1].unload(1.0)
    Hosting(models[1:2]).check_health()
    await hosting.close()


@in_virtual_time
async def test_a_request_that_names_no_model_is_for_the_first_that_can_do_it() -> None:
    clients = [Client() for _ in range(4)]
    models = [
        HostedModel(str(index), client, aliases=(f"a{index}",))  # type: ignore[arg-type]
        for index, client in enumerate(clients)
    ]
    models[1].state = State.SLEEPING
    hosting = Hosting(models)
    await hosting.start(["2", "3"])
    clients[2].facts = ModelFacts(
        "bert", 1, 1, 1, 64, (), "bfloat16", "cpu", 0, 0, 0, 0.0, tasks=("embed",)
    )
    assert hosting.find_able("", lambda facts: not facts.tasks) is models[3]
    assert hosting.find_able("", lambda facts: "embed" in facts.tasks) is models[2]
    assert hosting.find_able("", lambda facts: "score" in facts.tasks) is models[1]
    assert hosting.find("") is models[0]
    assert hosting.find("a1") is models[1]
    with pytest.raises(ServiceError) as raised:
        hosting.find("4")
    assert raised.value.reason is Reason.MODEL_NOT_FOUND


def test_on_a_gpu_a_model_takes_what_its_weights_are_kept_in() -> None:
    client = Client()
    client.core_pid = os.getpid()  # type: ignore[assignment]
    model = HostedModel("m", client, state=State.READY)  # type: ignore[arg-type]
    client.facts = msgspec.structs.replace(FACTS, device="cuda:0", num_parameters=8 << 30)
    as_floats = model.memory_bytes
    client.facts = msgspec.structs.replace(client.facts, memory={"weights": 5 << 30})
    assert as_floats - model.memory_bytes == pytest.approx(11 << 30, rel=0.01)
