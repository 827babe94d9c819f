"""What is to be done so that an engine has what is desired: pure, and empty once it has."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from meshserve.v1 import engine_pb2
from services.gateway.hosting.desired import REVISION_MARK, Adapter, Desired

Kind = Literal["load_model", "unload_model", "load_adapter", "unload_adapter"]

_MAY_BE_LOADED = (engine_pb2.MODEL_STATE_UNLOADED, engine_pb2.MODEL_STATE_FAILED)
_MAY_BE_UNLOADED = (engine_pb2.MODEL_STATE_READY, engine_pb2.MODEL_STATE_SLEEPING)


@dataclass(frozen=True, slots=True)
class Action:
    """One call to an engine. `adapter` is the name that engines know it by."""

    kind: Kind
    model: str
    adapter: str = ""
    source: str = ""


def load_adapter(adapter: Adapter) -> Action:
    """What loads an adapter."""
    return Action("load_adapter", adapter.model, adapter.engine_name, adapter.source)


def actions(desired: Desired, hosted: engine_pb2.EngineModel) -> Iterator[Action]:
    """What is to be done about a model at an engine that says this of it, in this order.

    Adapters are left alone where the model is not ready: what is loaded then comes without them,
    and what sleeps cannot take any. Adapters without a revision are the engine's own.
    """
    name = hosted.name
    wanted = desired.models.get(name)
    if wanted and hosted.state in _MAY_BE_LOADED:
        yield Action("load_model", name)
    if wanted is False and hosted.state in _MAY_BE_UNLOADED:
        yield Action("unload_model", name)
    if wanted is False or hosted.state != engine_pb2.MODEL_STATE_READY:
        return
    present = set(hosted.adapters)
    adapters = desired.adapters_of(name)
    for adapter in sorted(adapters, key=lambda each: each.load_time_unix_ms):
        if adapter.engine_name not in present:
            yield load_adapter(adapter)
    for stray in sorted(present - {each.engine_name for each in adapters}):
        if REVISION_MARK in stray:
            yield Action("unload_adapter", name, stray)
