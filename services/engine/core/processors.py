"""The processors of this machine that an engine may compute on, and how many threads suit them."""

from __future__ import annotations

import functools
import math
import os
from collections.abc import Iterable, Iterator
from pathlib import Path

import torch

_CPUS = Path("/sys/devices/system/cpu")
_CGROUPS = Path("/sys/fs/cgroup")
_OWN_CGROUPS = Path("/proc/self/cgroup")


@functools.cache
def default_threads() -> int:
    """Threads that compute where no number is set: one for each core, no more than the cgroup's
    quota of processor time pays for, and no more than torch would take, which heeds
    `OMP_NUM_THREADS`. torch is asked before an engine takes threads from it."""
    cores = len(set(map(_core, os.sched_getaffinity(0))))
    return max(1, min(cores, available_processors(), torch.get_num_threads()))


def available_processors() -> int:
    """How many this process may keep busy, by its affinity and its cgroup's quota."""
    return max(1, int(min(len(os.sched_getaffinity(0)), *_quotas(), math.inf)))


def own_processors(num_threads: int) -> list[int] | None:
    """A processor for each of `num_threads` threads, each on a core of its own as far as there are
    cores; None where the process may run on all that are online. Those are for everyone: to stay on
    some of them would be to stay where another engine stays too."""
    allowed = os.sched_getaffinity(0)
    if len(allowed) == os.cpu_count() or len(allowed) < num_threads:
        return None
    return _cores_first(allowed)[:num_threads]


def _cores_first(processors: Iterable[int]) -> list[int]:
    """The same, one of each core before any core comes again."""
    seen: dict[str, int] = {}
    ranked = []
    for processor in sorted(processors):
        core = _core(processor)
        seen[core] = seen.get(core, 0) + 1
        ranked.append((seen[core], processor))
    return [processor for _, processor in sorted(ranked)]


def _core(processor: int) -> str:
    """What the hardware threads of one core have in common."""
    try:
        return (_CPUS / f"cpu{processor}" / "topology" / "thread_siblings_list").read_text()
    except OSError:
        return str(processor)


def _quotas() -> Iterator[float]:
    """The processors' worth of time that each cgroup over this process may use, where limited."""
    try:
        lines = _OWN_CGROUPS.read_text().splitlines()
    except OSError:
        return
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers and "cpu" not in controllers.split(","):
            continue
        root = _CGROUPS / "cpu" if controllers else _CGROUPS
        group = root / path.lstrip("/")
        # In a container the path may be that of the host, which is not to be seen there.
        for folder in (root, *(each for each in (group, *group.parents) if root in each.parents)):
            yield from (_unified_quota if not controllers else _legacy_quota)(folder)


def _unified_quota(folder: Path) -> Iterator[float]:
    try:
        quota, period = (folder / "cpu.max").read_text().split()
    except OSError:
        return
    if quota != "max":
        yield int(quota) / int(period)


def _legacy_quota(folder: Path) -> Iterator[float]:
    try:
        quota = int((folder / "cpu.cfs_quota_us").read_text())
        period = int((folder / "cpu.cfs_period_us").read_text())
    except OSError:
        return
    if quota > 0:
        yield quota / period
