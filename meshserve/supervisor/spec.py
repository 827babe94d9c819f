"""What the supervisor is told about each process that it runs."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from enum import StrEnum

Probe = Callable[[], Awaitable[None]]
"""Returns when the process can do its work, raises ProbeError when it cannot."""


class ProbeError(Exception):
    """The process cannot do its work now. `answered` is False when it did not even say so."""

    def __init__(self, message: str, *, answered: bool) -> None:
        super().__init__(message)
        self.answered = answered


@dataclass(frozen=True, slots=True)
class ListenAddress:
    """An address that a process will listen on, and the setting it comes from."""

    setting: str
    address: str
    """`HOST:PORT`."""

    @property
    def setting_variable(self) -> str:
        """The environment variable that overrides the setting."""
        return "MESHSERVE_" + self.setting.upper().replace(".", "__")


@dataclass(frozen=True, slots=True)
class ProcessSpec:
    """One process of the mesh."""

    name: str
    command: tuple[str, ...]
    probe: Probe
    environment: Mapping[str, str] = field(default_factory=dict)
    """The whole environment of the process."""
    addresses: tuple[ListenAddress, ...] = ()
    stage: int = 0
    """Processes of a stage start together, once those of the stages before are healthy."""
    start_timeout_s: float = 300.0
    """How long it may take to become healthy."""
    stop_timeout_s: float = 35.0
    """How long it may take to end after SIGTERM."""
    unresponsive_timeout_s: float = 30.0
    """A process that answers no probe for this long is killed and started again."""
    essential: bool = True
    """Whether the mesh waits for it at the start, and ends when it is dead for good."""
    fatal_exit_codes: frozenset[int] = frozenset({78, 126})
    """Exit codes that another start cannot change: 78 is EX_CONFIG of sysexits.h."""


class ProcessState(StrEnum):
    """Where in its life a process is."""

    WAITING = "waiting"
    STARTING = "starting"
    HEALTHY = "healthy"
    UNHEALTHY = "unhealthy"
    RESTARTING = "restarting"
    FAILED = "failed"
    STOPPING = "stopping"
    STOPPED = "stopped"


@dataclass(slots=True)
class ProcessStatus:
    """What is known of a process now. Owned by the supervisor; others read."""

    name: str
    state: ProcessState = ProcessState.WAITING
    detail: str = ""
    pid: int | None = None
    restarts: int = 0
    since_s: float = 0.0
    """Monotonic time of the last change of state."""
    start_took_s: float | None = None
    """From the last start to healthy."""
