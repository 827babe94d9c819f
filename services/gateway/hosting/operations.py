"""What operators ask for, done at all engines of a model at the same time.

A load is kept once an engine has done it, and nothing is kept where none could; what is to go is
kept first, so that no request comes in between. Who failed alone is seen to by the reconciler.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from meshserve.v1 import engine_pb2
from services.gateway.hosting.calls import HostingCalls
from services.gateway.hosting.desired import Adapter
from services.gateway.hosting.hosting import Hosting, adapter_not_found
from services.gateway.hosting.names import Names
from services.gateway.hosting.plan import Action, load_adapter
from services.gateway.hosting.watch import UNKNOWN, Report
from services.runtime.attempts import unreachable
from services.runtime.errors import Reason, ServiceError, invalid_field
from services.runtime.replicas import Replica
from services.runtime.settings.schema import ADAPTER_NAME

MAX_SOURCE_CHARS = 4096

_READY, _SLEEPING, _LOADING = (
    engine_pb2.MODEL_STATE_READY,
    engine_pb2.MODEL_STATE_SLEEPING,
    engine_pb2.MODEL_STATE_LOADING,
)

# What one engine is asked for.
Request = Callable[[Replica], Any]


@dataclass(frozen=True, slots=True)
class Outcome:
    """What came of asking the engines: by replica, the answer or why there is none."""

    answers: Mapping[Replica, Any] = field(default_factory=dict)
    failures: Mapping[Replica, ServiceError] = field(default_factory=dict)

    def check_any(self) -> None:
        """Raises the ServiceError of an engine where none has done it."""
        if self.answers:
            return
        if not self.failures:
            raise unreachable("engine")
        # What an engine has to say is worth more than that another is away.
        away = (Reason.SERVICE_UNAVAILABLE, Reason.DRAINING)
        raise min(self.failures.values(), key=lambda error: error.reason in away)


class Operations:
    """Loads, unloads, puts to sleep and wakes. Everything raises ServiceError."""

    def __init__(self, hosting: Hosting, names: Names, calls: HostingCalls) -> None:
        self._hosting = hosting
        self._names = names
        self._calls = calls

    async def load_model(self, model: str) -> Outcome:
        """Has all engines load a model, those that start later as well."""
        store = self._hosting.store
        async with store.lease(model):
            await self._hosting.look(model)
            outcome = await self._ask(model, "load_model", engine_pb2.LoadModelRequest(model=model))
            outcome.check_any()
            await store.change(lambda desired: desired.with_model(model, loaded=True))
            await self._hosting.look(model)
        return outcome

    async def unload_model(self, model: str, timeout_ms: int | None) -> Outcome:
        """Refuses requests for a model from now on, and has all engines unload it."""
        store = self._hosting.store
        async with store.lease(model):
            await store.change(lambda desired: desired.with_model(model, loaded=False))
            await self._hosting.look(model)
            outcome = await self._ask(
                model,
                "unload_model",
                engine_pb2.UnloadModelRequest(model=model, timeout_ms=timeout_ms),
                lambda state: state in (_READY, _SLEEPING, _LOADING),
            )
            await self._hosting.look(model)
        return outcome

    async def sleep_model(self, model: str) -> Outcome:
        """Has all engines that have a model in memory free it until it is asked for."""
        return await self._ask_those_that_can(
            model, "sleep_model", engine_pb2.SleepModelRequest(model=model)
        )

    async def wake_model(self, model: str) -> Outcome:
        """Has all engines where a model sleeps bring it back."""
        return await self._ask_those_that_can(
            model, "wake_model", engine_pb2.WakeModelRequest(model=model)
        )

    async def load_adapter(self, model: str, name: str, source: str) -> Outcome:
        """Has all engines load an adapter, in the place of what has its name."""
        if not re.fullmatch(ADAPTER_NAME, name):
            raise invalid_field("adapter", "1 to 128 letters, digits and any of . _ - /")
        if not source or len(source) > MAX_SOURCE_CHARS:
            raise invalid_field("source", "a path on the engines' machines, or a hub id, is needed")
        self._hosting.check_takes_requests(model)
        adapter = Adapter.new(model, name, source)
        store = self._hosting.store
        async with store.lease(model):
            await self._hosting.look(model)
            self._check_name(adapter)
            outcome = await self._perform(model, load_adapter(adapter))
            outcome.check_any()

            def add(desired: Any) -> Any:
                # Another gateway may have given the name to another model meanwhile.
                self._check_owner(adapter, desired.adapters.get(name))
                return desired.with_adapter(adapter)

            await store.change(add)
            await self._hosting.look(model)
        return outcome

    async def unload_adapter(self, model: str, name: str) -> Outcome:
        """Has all engines unload an adapter once the requests that use it have ended."""
        known = self._hosting.adapters.get(name)
        if not model and known is not None:
            model = known.model
        if known is None or known.model != model:
            raise adapter_not_found(model, name, self._hosting.adapters_of(model))
        store = self._hosting.store
        async with store.lease(model):
            await store.refresh()
            adapter = store.current.adapters.get(name)
            if adapter is None:
                raise ServiceError(
                    Reason.ADAPTER_NAME_TAKEN,
                    f"the settings of the engines declare {name!r}; it goes with its entry there",
                    metadata={"model": model},
                )
            await store.change(lambda desired: desired.without_adapter(name))
            self._hosting.publish()
        # Not under the lease: it may take as long as the longest answer.
        outcome = await self._perform(
            model, Action("unload_adapter", model, adapter.engine_name), having=adapter.engine_name
        )
        await self._hosting.look(model)
        return outcome

    async def _ask_those_that_can(self, model: str, kind: str, request: Any) -> Outcome:
        async with self._hosting.store.lease(model):
            await self._hosting.look(model)
            outcome = await self._ask(
                model, kind, request, lambda state: state in (_READY, _SLEEPING, _LOADING, UNKNOWN)
            )
            if not outcome.answers:
                self._hosting.check_takes_requests(model)
            outcome.check_any()
            await self._hosting.look(model)
        return outcome

    async def _perform(self, model: str, action: Action, having: str = "") -> Outcome:
        watch = self._hosting.watch(model)
        replicas = [
            replica
            for replica, report in watch.reports.items()
            if _state(report, model) in (_READY, _SLEEPING, UNKNOWN)
            and (not having or having in watch.adapters_at(replica, model))
        ]
        return await _all(
            replicas, lambda replica: self._calls.perform(watch.channel, replica, action)
        )

    async def _ask(
        self,
        model: str,
        kind: str,
        request: Any,
        wanted: Callable[[engine_pb2.ModelState.ValueType], bool] = lambda state: True,
    ) -> Outcome:
        watch = self._hosting.watch(model)
        replicas = [
            replica for replica, report in watch.reports.items() if wanted(_state(report, model))
        ]
        return await _all(
            replicas, lambda replica: self._calls.ask(watch.channel, replica, kind, request)
        )

    def _check_name(self, adapter: Adapter) -> None:
        if self._names.is_model(adapter.name):
            raise _taken(adapter.name, "a model has this name", adapter.name)
        known = self._hosting.adapters.get(adapter.name)
        if known is not None and adapter.name not in self._hosting.store.current.adapters:
            raise _taken(adapter.name, "the settings of the engines declare it", known.model)
        self._check_owner(adapter, self._hosting.store.current.adapters.get(adapter.name))

    def _check_owner(self, adapter: Adapter, known: Adapter | None) -> None:
        if known is not None and known.model != adapter.model:
            raise _taken(adapter.name, f"the model {known.model!r} has it", known.model)


async def _all(replicas: list[Replica], request: Request) -> Outcome:
    results = await asyncio.gather(
        *(request(replica) for replica in replicas), return_exceptions=True
    )
    answers: dict[Replica, Any] = {}
    failures: dict[Replica, ServiceError] = {}
    for replica, result in zip(replicas, results, strict=True):
        if isinstance(result, ServiceError):
            failures[replica] = result
        elif isinstance(result, BaseException):
            raise result
        else:
            answers[replica] = result
    return Outcome(answers, failures)


def _state(report: Report, model: str) -> engine_pb2.ModelState.ValueType:
    """What a model does at an engine, as that has said last."""
    found = report.models.get(model) if report.models else None
    return UNKNOWN if found is None else found.state


def _taken(name: str, why: str, model: str) -> ServiceError:
    return ServiceError(
        Reason.ADAPTER_NAME_TAKEN,
        f"no adapter can be called {name!r}: {why}",
        field_violations=[("adapter", "the name is taken")],
        metadata={"model": model},
    )
