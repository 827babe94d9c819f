"""Sums over ranks that are processes, on cards of their own or, in turns, on one."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from services.engine.core.kernels import cuda
from tests.fakes.cuda import peer_processes
from tests.fakes.cuda.peer_processes import run

pytestmark = [pytest.mark.gpu, pytest.mark.timeout(900)]


@pytest.fixture(params=["one card", "all cards"])
def devices(request: pytest.FixtureRequest) -> list[int]:
    cuda.activate(torch.device("cuda"))  # so that ranks find the kernels compiled
    if request.param == "one card":
        return [0, 0]
    count = min(torch.cuda.device_count(), 8)
    if count < 2:
        pytest.skip("there are no two GPUs")
    return list(range(count))


def test_sums_are_right_launched_and_in_graphs(devices: list[int], tmp_path: Path) -> None:
    assert run(peer_processes.sums_are_right, devices, tmp_path) == [""] * len(devices)


def test_ranks_choose_alike_by_what_they_measure(devices: list[int], tmp_path: Path) -> None:
    said = run(peer_processes.choice, devices, tmp_path)
    assert len(set(said)) == 1
    assert said[0] != "nothing"
    # On one card processes take turns: there it does not say which is the fastest.
    assert said[0].endswith(": True") or len(set(devices)) == 1


def test_a_rank_that_never_comes_is_found(devices: list[int], tmp_path: Path) -> None:
    timed_out, *_ = run(peer_processes.waits_in_vain, devices, tmp_path)
    assert timed_out


def test_what_waits_for_too_long_gives_no_result(devices: list[int], tmp_path: Path) -> None:
    said, *_ = run(peer_processes.is_trapped, devices, tmp_path)
    assert "CUDA error" in said


def test_a_rank_that_is_killed_while_others_wait_for_it_holds_up_nobody(
    devices: list[int], tmp_path: Path
) -> None:
    waited_s, *_ = run(peer_processes.outlives_another, devices, tmp_path, killed=len(devices) - 1)
    assert waited_s < 10
