"""Whatever becomes of engines and loads, they end up with what is desired, and are left alone."""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any, cast

from hypothesis import given, settings
from hypothesis import strategies as st

from meshserve.v1 import engine_pb2
from services.gateway.hosting.desired import Adapter, Desired
from services.gateway.hosting.plan import Action
from services.gateway.hosting.reconciler import STRAY_GRACE_S, Reconciler
from services.runtime.errors import Reason, ServiceError

READY, UNLOADED, FAILED = (
    engine_pb2.MODEL_STATE_READY,
    engine_pb2.MODEL_STATE_UNLOADED,
    engine_pb2.MODEL_STATE_FAILED,
)
MODELS = ("a", "b")
NAMES = ("x", "y", "z")


@dataclass(eq=False)
class Engine:
    """An engine that does what it is asked for, or fails by chance while `flaky`."""

    number: int
    flaky: bool = False
    starts: int = 0
    models: dict[str, engine_pb2.EngineModel] = field(default_factory=dict)
    done: list[Action] = field(default_factory=list)

    def start(self) -> None:
        self.starts += 1
        self.done.clear()
        self.models = {
            name: engine_pb2.EngineModel(name=name, state=READY, adapters=["own"])
            for name in MODELS
        }

    @property
    def instance_id(self) -> str:
        return f"{self.number}/{self.starts}"

    @property
    def address(self) -> str:
        return str(self.number)

    def perform(self, action: Action, chance: random.Random) -> None:
        model = self.models[action.model]
        if self.flaky and chance.random() < 0.5:
            if action.kind == "load_model":
                model.state = FAILED
            raise ServiceError(Reason.INTERNAL, "by chance")
        self.done.append(action)
        if action.kind == "load_model":
            model.state = READY
        elif action.kind == "unload_model":
            model.state = UNLOADED
            del model.adapters[:]
        elif action.kind == "load_adapter":
            assert model.state == READY
            assert action.adapter not in model.adapters, "loaded twice"
            model.adapters.append(action.adapter)
        else:
            model.adapters.remove(action.adapter)


class World:
    """Engines, gateways with a clock in common, and what operators want."""

    def __init__(self, seed: int, gateways: int) -> None:
        self.now = 0.0
        self.chance = random.Random(seed)
        self.engines = [Engine(number) for number in range(2)]
        for engine in self.engines:
            engine.start()
        self.desired = Desired()
        self._held: set[str] = set()
        self.gateways = [
            Reconciler(cast(Any, self), cast(Any, self), MODELS, lambda: self.now)
            for _ in range(gateways)
        ]

    # What a reconciler sees of hosting, of the store and of a watch.
    @property
    def store(self) -> Any:
        return SimpleNamespace(current=self.desired, refresh=self.refresh, lease=self.lease)

    def watch(self, model: str) -> Any:
        def on_replicas(name: str) -> Iterator[tuple[Engine, engine_pb2.EngineModel]]:
            for engine in self.engines:
                copy = engine_pb2.EngineModel()
                copy.CopyFrom(engine.models[name])
                yield engine, copy

        return SimpleNamespace(on_replicas=on_replicas, channel=None)

    async def refresh(self) -> None: ...

    async def look(self, model: str) -> None: ...

    @asynccontextmanager
    async def lease(self, model: str, *, wait: bool) -> AsyncIterator[bool]:
        if model in self._held:
            yield False
            return
        self._held.add(model)
        try:
            yield True
        finally:
            self._held.discard(model)

    async def perform(self, channel: Any, replica: Engine, action: Action) -> None:
        await asyncio.sleep(0)
        replica.perform(action, self.chance)

    async def pass_time(self, seconds: float) -> None:
        for _ in range(int(seconds)):
            self.now += 1
            await asyncio.gather(*(gateway.look() for gateway in self.gateways))
            await asyncio.gather(*(gateway.settle() for gateway in self.gateways))

    def happen(self, event: str, engine: int, model: str, name: str) -> None:
        match event:
            case "restart":
                self.engines[engine].start()
            case "come":
                self.engines.append(Engine(len(self.engines)))
                self.engines[-1].start()
            case "leave":
                if len(self.engines) > 1:
                    self.engines.pop(engine)
            case "load":
                adapter = Adapter.new(model, f"{model}-{name}", "/source")
                self.desired = self.desired.with_adapter(adapter)
            case "unload":
                self.desired = self.desired.without_adapter(f"{model}-{name}")
            case "load_model":
                self.desired = self.desired.with_model(model, loaded=True)
            case "unload_model":
                self.desired = self.desired.with_model(model, loaded=False)
            case "flaky":
                self.engines[engine].flaky = True

    def check(self) -> None:
        for engine in self.engines:
            for name, model in engine.models.items():
                unwanted = self.desired.models.get(name) is False
                assert model.state == (UNLOADED if unwanted else READY)
                wanted = {each.engine_name for each in self.desired.adapters_of(name)}
                had = set(model.adapters) - {"own"}
                assert had == (set() if unwanted else wanted)


EVENTS = st.tuples(
    st.sampled_from(
        [
            "restart",
            "come",
            "leave",
            "load",
            "load",
            "unload",
            "load_model",
            "unload_model",
            "flaky",
        ]
    ),
    st.integers(0, 1),
    st.sampled_from(MODELS),
    st.sampled_from(NAMES),
    st.integers(0, 3),
)


@settings(max_examples=60, deadline=None)
@given(st.lists(EVENTS, max_size=14), st.integers(0, 2**32), st.integers(1, 3))
def test_engines_get_what_is_desired_and_are_left_alone_then(
    events: list[tuple[str, int, str, str, int]], seed: int, gateways: int
) -> None:
    async def run() -> None:
        world = World(seed, gateways)
        for event, engine, model, name, seconds in events:
            world.happen(event, min(engine, len(world.engines) - 1), model, name)
            await world.pass_time(seconds)
        for each in world.engines:
            each.flaky = False
        # By then what failed again and again is tried once more, and strays are gone.
        await world.pass_time(STRAY_GRACE_S + 330)
        world.check()
        done = [len(each.done) for each in world.engines]
        await world.pass_time(2 * STRAY_GRACE_S)
        assert [len(each.done) for each in world.engines] == done
        for each in world.engines:
            # A process loads an adapter once, and never what it has unloaded.
            loads = [action for action in each.done if action.kind == "load_adapter"]
            unloads = [action for action in each.done if action.kind == "unload_model"]
            assert unloads or len(loads) == len(set(loads))

    asyncio.run(run())


def test_what_fails_is_tried_ever_later() -> None:
    async def run() -> None:
        world = World(0, 1)
        tries: list[float] = []

        async def refuse(channel: Any, replica: Engine, action: Action) -> None:
            if replica.number == 0:
                tries.append(world.now)
            raise ServiceError(Reason.INTERNAL, "never")

        world.perform = refuse  # type: ignore[method-assign]
        world.happen("load", 0, "a", "x")
        await world.pass_time(70)
        assert tries == [1, 3, 7, 15, 31, 63]

    asyncio.run(run())


def test_what_nobody_wants_stays_for_a_while() -> None:
    async def run() -> None:
        world = World(0, 2)
        world.happen("load", 0, "a", "x")
        await world.pass_time(2)
        world.happen("unload", 0, "a", "x")
        await world.pass_time(STRAY_GRACE_S - 1)
        assert len(world.engines[0].models["a"].adapters) == 2
        await world.pass_time(3)
        world.check()

    asyncio.run(run())
