"""Threads suit the cores, the affinity and the quota that a process has been given."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

from services.engine.core import processors
from services.engine.core.kernels.cpu.library import Library
from services.engine.core.kernels.cpu.team import Team
from tests.fakes.paged_step import libraries


class Machine:
    """A machine of 4 cores with two hardware threads each: 0 and 4 are one core, and so on."""

    def __init__(self, root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.root, self._monkeypatch = root, monkeypatch
        for processor in range(8):
            topology = root / "cpus" / f"cpu{processor}" / "topology"
            topology.mkdir(parents=True)
            (topology / "thread_siblings_list").write_text(f"{processor % 4},{processor % 4 + 4}\n")
        (root / "groups").mkdir()
        self.be_in("0::/")
        self.allow(range(8))
        monkeypatch.setattr(processors, "_CPUS", root / "cpus")
        monkeypatch.setattr(processors, "_CGROUPS", root / "groups")
        monkeypatch.setattr(processors, "_OWN_CGROUPS", root / "own")
        monkeypatch.setattr(os, "cpu_count", lambda: 8)
        monkeypatch.setattr(torch, "get_num_threads", lambda: 8)
        processors.default_threads.cache_clear()

    def allow(self, allowed: range | set[int]) -> None:
        self._monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(allowed))

    def be_in(self, *lines: str) -> None:
        (self.root / "own").write_text("".join(f"{line}\n" for line in lines))

    def write(self, path: str, text: str) -> None:
        (self.root / "groups" / path).parent.mkdir(parents=True, exist_ok=True)
        (self.root / "groups" / path).write_text(f"{text}\n")


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    yield Machine(tmp_path, monkeypatch)
    processors.default_threads.cache_clear()


def test_a_core_gets_one_thread(machine: Machine) -> None:
    assert processors.available_processors() == 8
    assert processors.default_threads() == 4


def test_torch_s_own_limit_holds(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "get_num_threads", lambda: 3)
    assert processors.default_threads() == 3


@pytest.mark.parametrize(
    ("quota", "threads"),
    [("max 100000", 4), ("250000 100000", 2), ("50000 100000", 1), ("1600000 100000", 4)],
)
def test_a_quota_of_the_container_limits_them(machine: Machine, quota: str, threads: int) -> None:
    machine.write("cpu.max", quota)
    assert processors.default_threads() == threads


def test_the_tightest_of_the_groups_above_counts(machine: Machine) -> None:
    machine.be_in("0::/pods/this/engine")
    machine.write("pods/cpu.max", "600000 100000")
    machine.write("pods/this/cpu.max", "300000 100000")
    machine.write("pods/this/engine/cpu.max", "max 100000")
    assert processors.available_processors() == 3


def test_the_first_version_of_cgroups_is_heeded_too(machine: Machine) -> None:
    machine.be_in("3:cpuset:/pods", "2:cpu,cpuacct:/pods", "0::/")
    machine.write("cpu/pods/cpu.cfs_quota_us", "200000")
    machine.write("cpu/pods/cpu.cfs_period_us", "100000")
    machine.write("cpu/cpu.cfs_quota_us", "-1")
    machine.write("cpu/cpu.cfs_period_us", "100000")
    assert processors.available_processors() == 2


def test_processors_of_its_own_are_taken_core_by_core(machine: Machine) -> None:
    machine.allow({1, 2, 5, 6, 7})
    assert processors.own_processors(3) == [1, 2, 7]
    assert processors.own_processors(5) == [1, 2, 7, 5, 6]


def test_processors_that_all_share_are_left_to_the_system(machine: Machine) -> None:
    assert processors.own_processors(4) is None
    machine.allow({1, 2})
    assert processors.own_processors(3) is None


@pytest.mark.parametrize("kernels", libraries()[:1], ids=lambda each: each.isa)
def test_the_threads_of_a_team_stay_where_they_are_told(kernels: Library) -> None:
    processor = max(os.sched_getaffinity(0))
    before = set(os.listdir("/proc/self/task"))
    team = Team(kernels, 2, [0, processor])
    (started,) = set(os.listdir("/proc/self/task")) - before
    assert os.sched_getaffinity(int(started)) == {processor}
    assert len(os.sched_getaffinity(0)) >= 1
    del team
