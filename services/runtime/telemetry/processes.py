"""What the processes of a service take of their machine, read when it is scraped."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING

import psutil

if TYPE_CHECKING:
    from services.runtime.telemetry.metrics import Metrics, Reading


def watch_processes(metrics: Metrics) -> None:
    """Has the metrics `meshserve_process_*` tell of `metrics.processes`."""

    def read(measure: Callable[[psutil.Process], float]) -> Callable[[], Iterable[Reading]]:
        def readings() -> Iterator[Reading]:
            for name, pid_of in metrics.processes.items():
                pid = pid_of()
                if pid is None:
                    continue
                try:
                    value = measure(psutil.Process(pid))
                except psutil.Error:
                    # It has ended since, or the system does not tell.
                    continue
                yield (name,), value

        return readings

    for name, measure in _MEASURES.items():
        metrics.read(f"meshserve_process_{name}", read(measure))


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
