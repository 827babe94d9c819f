"""Peak memory of a process and all its descendants, sampled while it works."""

from __future__ import annotations

import threading
from pathlib import Path
from types import TracebackType
from typing import Self

PERIOD_S = 1.0


def descendants(pid: int) -> list[int]:
    """The process and every process below it that is still there."""
    found = [pid]
    for parent in found:  # grows while it is walked
        for task in _children_files(parent):
            try:
                found.extend(int(child) for child in task.read_text().split())
            except OSError:
                continue
    return found


def proportional_bytes(pid: int) -> int:
    """Proportional set size: private pages plus a share of those it has in common; 0 if gone."""
    try:
        lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    except OSError:
        return 0
    return sum(int(line.split()[1]) * 1024 for line in lines if line.startswith("Pss:"))


def tree_bytes(pid: int) -> int:
    """Memory of the whole process tree: what would be free again if all of it ended."""
    return sum(proportional_bytes(each) for each in descendants(pid))


class PeakMemory:
    """Samples a process tree from a thread while the `with` block runs.

    Once a second: reading takes some milliseconds of processor time per gigabyte, and what a server
    holds, it holds for longer than that.
    """

    def __init__(self, pid: int) -> None:
        self._pid = pid
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._sample, daemon=True)
        self.peak_bytes = 0

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        tb: TracebackType | None,
    ) -> None:
        self._ended.set()
        self._thread.join()
        self._take()

    def _take(self) -> None:
        self.peak_bytes = max(self.peak_bytes, tree_bytes(self._pid))

    def _sample(self) -> None:
        self._take()
        while not self._ended.wait(PERIOD_S):
            self._take()


def _children_files(pid: int) -> list[Path]:
    return list(Path(f"/proc/{pid}/task").glob("*/children"))
