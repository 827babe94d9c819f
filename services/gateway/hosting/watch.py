"""What each engine says it has in memory, asked again and again."""

from __future__ import annotations

import asyncio
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import TypeAlias

import grpc

from meshserve.v1 import engine_pb2
from services.gateway.overview.asking import NotAnsweredError, ask
from services.gateway.peers import Engines
from services.runtime.replicas import Eligible, Replica, ReplicaState

LIST_MODELS = "/meshserve.v1.EngineService/ListModels"
_REQUEST = engine_pb2.EngineServiceListModelsRequest()

State: TypeAlias = engine_pb2.ModelState.ValueType
UNKNOWN = engine_pb2.MODEL_STATE_UNSPECIFIED
# What is told of a model that is in several: the first of these.
STATES: tuple[State, ...] = (
    engine_pb2.MODEL_STATE_READY,
    engine_pb2.MODEL_STATE_SLEEPING,
    engine_pb2.MODEL_STATE_LOADING,
    engine_pb2.MODEL_STATE_DRAINING,
    engine_pb2.MODEL_STATE_FAILED,
    engine_pb2.MODEL_STATE_UNLOADED,
)
# In which an engine takes requests, and has them wait in the second and third.
TAKES_REQUESTS = frozenset(STATES[:3])
_LOADING = frozenset({engine_pb2.MODEL_STATE_LOADING})
_NOT_HOSTED = engine_pb2.EngineModel(state=engine_pb2.MODEL_STATE_UNLOADED)


@dataclass(frozen=True, slots=True)
class Report:
    """What one engine has said.

    Attributes:
        instance_id: of the process that has said it.
        models: by name. None: it does not tell, as engines of older versions.
        problem: why it does not answer now; what it said before stands.
    """

    instance_id: str
    models: Mapping[str, engine_pb2.EngineModel] | None
    problem: str = ""


@dataclass(frozen=True, slots=True)
class Placement:
    """Where requests for a model can go.

    Attributes:
        state: the best of all engines; UNKNOWN where none tells.
        absent: replicas that say that they take no requests for the model, or are only about to
            while others do, each with the process that has said so. Who says nothing may be asked.
        ready: those that say that they have it in memory.
        adapters: by the name that engines know it by, those that say that they have an adapter.
    """

    state: State = UNKNOWN
    absent: Mapping[Replica, str] = field(default_factory=dict)
    ready: Mapping[Replica, str] = field(default_factory=dict)
    adapters: Mapping[str, Mapping[Replica, str]] = field(default_factory=dict)

    def eligible(self, adapter: str = "") -> Eligible | None:
        """Who can take a request for the model, or for an adapter of it; None: everybody."""
        # What a process has said goes for no other at its address.
        if adapter:
            return _among(self.adapters.get(adapter, {}))
        absent = self.absent
        if not absent:
            return None
        return lambda replica: absent.get(replica) != replica.instance_id

    def able_to_describe(self) -> Eligible | None:
        """Who can say what the model is: of those that tell, who has it in memory; None:
        everybody."""
        return _among(self.ready) if self.ready else None


def is_there(replica: Replica) -> bool:
    """Whether an engine can be asked."""
    return replica.state in (ReplicaState.SERVING, ReplicaState.NOT_SERVING)


def _among(there: Mapping[Replica, str]) -> Eligible:
    return lambda replica: there.get(replica) == replica.instance_id


class EngineWatch:
    """The engines at one target."""

    def __init__(self, engines: Engines, models: Iterable[str]) -> None:
        self.engines = engines
        self.channel = engines.channel
        self.models = tuple(models)
        self.reports: dict[Replica, Report] = {}

    async def look(self) -> None:
        """Asks all that can be reached; takes little longer than a second at most."""
        replicas = self.channel.replicas.processes()
        answers = await asyncio.gather(*(self._ask(replica) for replica in replicas))
        self.reports = dict(zip(replicas, answers, strict=True))

    def on_replicas(self, model: str) -> Iterator[tuple[Replica, engine_pb2.EngineModel]]:
        """The replicas that take calls and tell of the model, and what they tell."""
        for replica, report in self.reports.items():
            if replica.takes_calls and report.models and model in report.models:
                yield replica, report.models[model]

    def adapters_at(self, replica: Replica, model: str) -> Collection[str]:
        """The adapters that a replica says it has, by the names that engines know."""
        report = self.reports.get(replica)
        if report is None or not report.models or model not in report.models:
            return ()
        return report.models[model].adapters

    def placement(self, model: str) -> Placement:
        """Where requests for a model can go, by the last reports."""
        told = {
            replica: (report.instance_id, report.models.get(model, _NOT_HOSTED))
            for replica, report in self.reports.items()
            if report.models
        }
        # Of engines that are away, only what they said last is known.
        states = {found.state for replica, (_, found) in told.items() if is_there(replica)}
        states = states or {found.state for _, found in told.values()}
        best = next((each for each in STATES if each in states), UNKNOWN)
        # While others have it, none waits for it to be read.
        taking = {best} if best == engine_pb2.MODEL_STATE_LOADING else TAKES_REQUESTS - _LOADING
        absent: dict[Replica, str] = {}
        ready: dict[Replica, str] = {}
        adapters: dict[str, dict[Replica, str]] = {}
        for replica, (instance_id, found) in told.items():
            if found.state not in taking:
                absent[replica] = instance_id
                continue
            if found.state == engine_pb2.MODEL_STATE_READY:
                ready[replica] = instance_id
            for adapter in found.adapters:
                adapters.setdefault(adapter, {})[replica] = instance_id
        tells_all = all(report.models is not None for report in self.reports.values())
        return Placement(best if tells_all else UNKNOWN, absent, ready, adapters)

    async def _ask(self, replica: Replica) -> Report:
        instance_id = replica.instance_id
        known = self.reports.get(replica)
        before = known.models if known and known.instance_id == instance_id else {}
        if not is_there(replica):
            return Report(instance_id, before, f"is {replica.standing}")
        rpc = replica.link.rpc(LIST_MODELS, "unary_unary")
        try:
            said = await ask(rpc, _REQUEST, engine_pb2.EngineServiceListModelsResponse)
        except NotAnsweredError as error:
            cause = error.__cause__
            tells = not (
                isinstance(cause, grpc.aio.AioRpcError)
                and cause.code() is grpc.StatusCode.UNIMPLEMENTED
            )
            return Report(instance_id, before if tells else None, str(error) if tells else "")
        return Report(instance_id, {model.name: model for model in said.models})
