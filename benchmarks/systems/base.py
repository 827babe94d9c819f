"""What the runner needs of a system."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Any, Protocol

from benchmarks.load import Run
from benchmarks.workloads import Request, Workload


class RunningSystem(Protocol):
    """A system that serves."""

    @property
    def pid(self) -> int:
        """Root of its process tree, for measuring memory."""
        ...

    def first_token(self, request: Request) -> None:
        """Asks again and again until a first token comes: how starting up is timed.

        Raises:
            BenchmarkError: the system ended, or did not get that far in time.
        """
        ...

    def run(self, workload: Workload) -> Run:
        """Does a workload. Raises BenchmarkError."""
        ...


class System(Protocol):
    """One entry of the report: a server in one configuration."""

    @property
    def name(self) -> str:
        """Short and unique: `vllm`, `llamacpp-q8_0`."""
        ...

    @property
    def title(self) -> str:
        """What a table's row says."""
        ...

    def describe(self) -> dict[str, Any]:
        """Versions and the configuration, for the report."""
        ...

    def missing(self) -> str | None:
        """What keeps the system from being measured on this machine, or None."""
        ...

    def start(self) -> AbstractContextManager[RunningSystem]:
        """Starts the system; leaving the block ends every process of it."""
        ...
