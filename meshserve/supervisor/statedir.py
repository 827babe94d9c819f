"""The directory in which a running mesh can be found: a lock, a state file, the logs."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Self

STATE_VARIABLE = "MESHSERVE_STATE"
MAX_LOG_BYTES = 64 * 2**20


class StateError(Exception):
    """The state directory cannot be used; the text says what to do."""


class AlreadyRunningError(Exception):
    """Another supervisor holds the state directory."""

    def __init__(self, mesh: RunningMesh | None) -> None:
        super().__init__("a mesh is already running")
        self.mesh = mesh


@dataclass(frozen=True, slots=True)
class ServiceEntry:
    """A service of a running mesh."""

    name: str
    target: str
    """gRPC target on this machine."""
    ca_file: str | None = None
    """PEM file that vouches for the service; None where it does not talk TLS."""


@dataclass(frozen=True, slots=True)
class RunningMesh:
    """What a supervisor says of itself while it runs."""

    pid: int
    gateway: ServiceEntry
    services: tuple[ServiceEntry, ...]
    """All services, the gateway among them."""
    ready: bool = False
    traces_url: str | None = None
    """Where traces are shown, if something shows them."""
    console_url: str | None = None
    """Where the gateway serves the web console; None where it serves none."""


class StateDir:
    """Access to the directory. Reading needs no lock; `acquire` makes this process its owner."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._lock_fd: int | None = None

    @classmethod
    def default(cls, environment: Mapping[str, str] = os.environ) -> Self:
        """MESHSERVE_STATE, else XDG_STATE_HOME/meshserve, else ~/.local/state/meshserve."""
        if own := environment.get(STATE_VARIABLE):
            return cls(Path(own).expanduser().absolute())
        base = environment.get("XDG_STATE_HOME") or "~/.local/state"
        return cls(Path(base).expanduser().absolute() / "meshserve")

    @property
    def log_dir(self) -> Path:
        """One log file per process."""
        return self.path / "logs"

    @property
    def valkey_dir(self) -> Path:
        """Working directory of the embedded Valkey."""
        return self.path / "valkey"

    @property
    def phoenix_dir(self) -> Path:
        """Where Phoenix keeps the traces that it was sent."""
        return self.path / "phoenix"

    def acquire(self) -> None:
        """Takes the directory until this process ends. Raises AlreadyRunningError, StateError."""
        try:
            self.log_dir.mkdir(parents=True, exist_ok=True)
            descriptor = os.open(self._lock_path, os.O_RDWR | os.O_CREAT, 0o600)
        except OSError as error:
            raise StateError(
                f"{error.filename or self.path}: {error.strerror}; set {STATE_VARIABLE} to a "
                "directory that can be written"
            ) from error
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(descriptor)
            raise AlreadyRunningError(self._read()) from None
        self._lock_fd = descriptor
        self._state_path.unlink(missing_ok=True)
        self._rotate_logs()

    def release(self) -> None:
        """Gives the directory back."""
        if self._lock_fd is not None:
            self._state_path.unlink(missing_ok=True)
            os.close(self._lock_fd)
            self._lock_fd = None

    def write(self, mesh: RunningMesh) -> None:
        """Lets other processes find the mesh. The owner alone calls this. Raises StateError."""
        assert self._lock_fd is not None, "acquire comes first"
        staged = self._state_path.with_suffix(".new")
        try:
            staged.write_text(json.dumps(asdict(mesh), indent=1), encoding="utf-8")
            staged.replace(self._state_path)
        except OSError as error:
            raise StateError(f"{staged}: {error.strerror}; free some space") from error

    def is_held(self) -> bool:
        """Whether a supervisor runs. Its lock ends with it, however it ends."""
        try:
            descriptor = os.open(self._lock_path, os.O_RDWR)
        except OSError:
            return False
        try:
            fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
        finally:
            os.close(descriptor)
        return False

    def running_mesh(self) -> RunningMesh | None:
        """The mesh that runs now, if one does."""
        return self._read() if self.is_held() else None

    @property
    def _lock_path(self) -> Path:
        return self.path / "lock"

    @property
    def _state_path(self) -> Path:
        return self.path / "state.json"

    def _read(self) -> RunningMesh | None:
        try:
            fields = json.loads(self._state_path.read_text(encoding="utf-8"))
            services = tuple(ServiceEntry(**entry) for entry in fields["services"])
            gateway = ServiceEntry(**fields["gateway"])
            return RunningMesh(
                int(fields["pid"]),
                gateway,
                services,
                bool(fields["ready"]),
                fields.get("traces_url"),
                fields.get("console_url"),
            )
        except (OSError, ValueError, TypeError, KeyError):
            return None

    def _rotate_logs(self) -> None:
        """Each run begins its own files; the ones of the run before are kept."""
        for log in self.log_dir.glob("*.log"):
            log.replace(log.with_suffix(".log.1"))


def trim_log(path: Path, max_bytes: int = MAX_LOG_BYTES) -> None:
    """Moves what a log holds aside once it is too large; writers go on in the same file."""
    try:
        if path.stat().st_size <= max_bytes:
            return
        with path.open("rb") as source:
            source.seek(-(max_bytes // 2), os.SEEK_END)
            path.with_suffix(".log.1").write_bytes(source.read())
        os.truncate(path, 0)
    except OSError:
        # A full disk: what was logged matters less than room to go on.
        with contextlib.suppress(OSError):
            os.truncate(path, 0)
