"""What the mesh has in memory, as this gateway knows it: the document, and what engines say."""

from __future__ import annotations

import asyncio
import difflib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from meshserve.v1 import engine_pb2
from services.gateway.hosting.desired import REVISION_MARK
from services.gateway.hosting.store import DesiredStore
from services.gateway.hosting.watch import TAKES_REQUESTS, UNKNOWN, EngineWatch, Placement
from services.gateway.peers import Peers
from services.runtime.errors import Reason, ServiceError
from services.runtime.settings import Settings
from services.runtime.telemetry import Metrics
from services.runtime.telemetry.metrics import Reading

LOADING_RETRY_S = 1.0
_NOWHERE = Placement()


@dataclass(frozen=True, slots=True)
class KnownAdapter:
    """An adapter by the name that requests use: whose it is, and what engines call it."""

    model: str
    engine_name: str


class Hosting:
    """Says of each model and adapter where it is. Nothing is asked for it while a request waits.

    Attributes:
        store: of the document.
        adapters: those that are desired or that engines have of their own, by name.
    """

    def __init__(
        self, settings: Settings, peers: Peers, store: DesiredStore, metrics: Metrics
    ) -> None:
        self.store = store
        self.adapters: Mapping[str, KnownAdapter] = {}
        self._settings = settings
        self._peers = peers
        self._watches: dict[str, EngineWatch] = {}
        self._placements: dict[str, Placement] = {}
        metrics.read("meshserve_gateway_model_engines", self._count_engines)
        metrics.read("meshserve_gateway_adapters", self._count_adapters)

    def watch(self, model: str) -> EngineWatch:
        """What the engines of a model say. Needs a running event loop."""
        settings = self._settings
        target = settings.models[model].engine_target or settings.engine.effective_target
        if target not in self._watches:
            self._watches[target] = EngineWatch(
                self._peers.engines(target), settings.models_at(target)
            )
        return self._watches[target]

    async def refresh(self) -> None:
        """Reads the document and asks all engines."""
        watches = {id(watch): watch for watch in map(self.watch, self._settings.models)}
        await asyncio.gather(self.store.refresh(), *(each.look() for each in watches.values()))
        self.publish()

    async def look(self, model: str) -> None:
        """Asks the engines of a model."""
        await self.watch(model).look()
        self.publish()

    def publish(self) -> None:
        """Takes note of what the document and the reports say now."""
        placements = {name: self.watch(name).placement(name) for name in self._settings.models}
        adapters = {
            name: KnownAdapter(model, name)
            for model, placement in placements.items()
            for name in placement.adapters
            if REVISION_MARK not in name
        }
        for name, adapter in self.store.current.adapters.items():
            if adapter.model in placements:
                adapters[name] = KnownAdapter(adapter.model, adapter.engine_name)
        self._placements, self.adapters = placements, adapters

    def placement(self, model: str) -> Placement:
        """Where requests for a model can go."""
        return self._placements.get(model, _NOWHERE)

    def state(self, model: str) -> engine_pb2.ModelState.ValueType:
        """What requests for a model find."""
        if self.store.current.models.get(model) is False:
            return engine_pb2.MODEL_STATE_UNLOADED
        return self.placement(model).state

    def adapters_of(self, model: str) -> list[str]:
        """The names of a model's adapters, sorted."""
        return sorted(name for name, each in self.adapters.items() if each.model == model)

    def check_takes_requests(self, model: str) -> None:
        """Raises ServiceError (MODEL_NOT_LOADED); passes what is not known."""
        state = self.state(model)
        if state == UNKNOWN or state in TAKES_REQUESTS:
            return
        label = engine_pb2.ModelState.Name(state).removeprefix("MODEL_STATE_").lower()
        raise ServiceError(
            Reason.MODEL_NOT_LOADED,
            f"the model {model!r} is {label}",
            metadata={"model": model, "state": label},
        )

    def engine_name(self, model: str, adapter: str) -> str:
        """What engines call an adapter of a model. Raises ServiceError (ADAPTER_NOT_FOUND,
        MODEL_LOADING)."""
        known = self.adapters.get(adapter)
        if known is None or known.model != model:
            raise adapter_not_found(model, adapter, self.adapters_of(model))
        if known.engine_name not in self.placement(model).adapters:
            raise ServiceError(
                Reason.MODEL_LOADING,
                f"the adapter {adapter!r} is being loaded",
                retry_after_s=LOADING_RETRY_S,
                metadata={"model": model, "adapter": adapter},
            )
        return known.engine_name

    def _count_engines(self) -> Iterable[Reading]:
        for watch in self._watches.values():
            for model in watch.models:
                states = [
                    report.models[model].state
                    for report in watch.reports.values()
                    if report.models and model in report.models
                ]
                for state in engine_pb2.ModelState.values():
                    if state != UNKNOWN and states:
                        label = engine_pb2.ModelState.Name(state).removeprefix("MODEL_STATE_")
                        yield (model, label.lower()), states.count(state)

    def _count_adapters(self) -> Iterable[Reading]:
        for model in self._settings.models:
            yield (model,), len(self.adapters_of(model))


def adapter_not_found(model: str, adapter: str, known: list[str]) -> ServiceError:
    """What says that a model has no adapter of a name, and which is the nearest."""
    shown = adapter[:128]
    near = difflib.get_close_matches(shown, known, n=1, cutoff=0.4)
    metadata = {"model": model}
    hint = ""
    if near:
        metadata["nearest"] = near[0]
        hint = f"; did you mean {near[0]!r}?"
    return ServiceError(
        Reason.ADAPTER_NOT_FOUND,
        f"the model {model!r} has no adapter called {shown!r}{hint}",
        field_violations=[("adapter", "unknown adapter")],
        metadata=metadata,
    )
