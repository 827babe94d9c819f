"""What the processes of a service take of their machine, read when it is scraped."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import TypeAlias

import psutil

Readings: TypeAlias = Callable[[], Iterable[tuple[tuple[str, ...], float]]]
"""What a metric is now: its label values, and its value."""


def process_readings(processes: Mapping[str, Callable[[], int | None]]) -> dict[str, Readings]:
    """By name, the metrics `meshserve_process_*` of processes, which are ids by a name of their
    own; None for one that does not run."""
    return {
        f"meshserve_process_{name}": _readings(processes, measure)
        for name, measure in _MEASURES.items()
    }


def _readings(
    processes: Mapping[str, Callable[[], int | None]], measure: Callable[[psutil.Process], float]
) -> Readings:
    def read() -> Iterator[tuple[tuple[str, ...], float]]:
        for name, pid_of in processes.items():
            pid = pid_of()
            if pid is None:
                continue
            try:
                value = measure(psutil.Process(pid))
            except psutil.Error:
                # It has ended since, or the system does not tell.
                continue
            yield (name,), value

    return read


def _cpu_seconds(process: psutil.Process) -> float:
    times = process.cpu_times()
    return float(times.user + times.system)


_MEASURES: dict[str, Callable[[psutil.Process], float]] = {
    "cpu_seconds": _cpu_seconds,
    "resident_memory_bytes": lambda process: process.memory_info().rss,
    "threads": lambda process: process.num_threads(),
    "open_fds": lambda process: process.num_fds(),
    "start_time_seconds": lambda process: process.create_time(),
}
