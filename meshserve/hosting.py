"""What operators see of models and adapters: which engine has them, and what went wrong there."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime


@dataclass(frozen=True, slots=True)
class ModelReplica:
    """A model on one engine."""

    address: str
    state: str = ""
    """One of `unloaded`, `loading`, `ready`, `sleeping`, `draining`, `failed`; empty: not known."""
    problem: str = ""
    """What went wrong there; empty: nothing."""
    reason: str = ""
    """A reason of docs/errors.md that goes with the problem."""
    memory_bytes: int = 0
    requests: int = 0
    """Requests in flight."""
    adapters: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class AdapterReplica:
    """An adapter on one engine."""

    address: str
    loaded: bool = False
    problem: str = ""
    reason: str = ""
    size_bytes: int = 0
    """What it takes; 0: not known."""


@dataclass(frozen=True, slots=True)
class HostedAdapter:
    """An adapter of a model."""

    name: str
    model: str
    source: str = ""
    """Where it was loaded from; empty: the settings of the engines declare it."""
    revision: str = ""
    """Tells it from what had the name before."""
    load_time: datetime | None = None
    replicas: tuple[AdapterReplica, ...] = ()

    @property
    def problems(self) -> tuple[str, ...]:
        """What went wrong, engine by engine."""
        return tuple(f"{each.address}: {each.problem}" for each in self.replicas if each.problem)


@dataclass(frozen=True, slots=True)
class HostedModel:
    """A model of the settings."""

    name: str
    state: str = ""
    """What requests find: the best of what its engines do."""
    intent: str = ""
    """What operators have asked for: `loaded` or `unloaded`; empty: as the settings have it."""
    replicas: tuple[ModelReplica, ...] = ()
    adapters: tuple[HostedAdapter, ...] = ()

    @property
    def problems(self) -> tuple[str, ...]:
        """What went wrong, engine by engine."""
        return tuple(f"{each.address}: {each.problem}" for each in self.replicas if each.problem)
