"""Ranks decide alike which sums are computed by our own kernels, whatever one of them finds."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from torch import Tensor

from services.engine.core.kernels.cuda import library
from services.engine.core.kernels.cuda.all_reduce import Inbox, PeerSums
from services.engine.core.kernels.cuda.build import SOURCES
from services.engine.core.parallel import ranks, short_sums
from services.engine.core.parallel.short_sums import (
    ONE_SHOT,
    OTHERWISE,
    SIZES,
    TWO_SHOT,
    Choice,
    Gather,
    ShortSums,
    slowest,
    try_sums,
)
from tests.fakes.cuda import emulator

CPU = torch.device("cpu")
RANKS = 3


class Meeting:
    """Where ranks that are threads tell each other of things."""

    def __init__(self, ranks: int = RANKS) -> None:
        self._barrier = threading.Barrier(ranks)
        self._told: list[Any] = [None] * ranks

    def gather_of(self, rank: int) -> Gather:
        def gather(own: Any) -> list[Any]:
            self._told[rank] = own
            self._barrier.wait(20)
            all_of_them = list(self._told)
            self._barrier.wait(20)
            return all_of_them

        return gather


def on_all_ranks(run: Callable[[int, Gather], Any], ranks: int = RANKS) -> list[Any]:
    meeting = Meeting(ranks)
    with ThreadPoolExecutor(ranks) as threads:
        started = [threads.submit(run, rank, meeting.gather_of(rank)) for rank in range(ranks)]
        return [each.result() for each in started]


@pytest.fixture
def kernels(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Memory of the emulator's; what kernels find is made up."""
    monkeypatch.setattr(short_sums, "try_sums", lambda peers, rank, device: None)
    monkeypatch.setattr(short_sums, "_measure", lambda peers, device, run: measured(4.0, 2.0))
    library.use(emulator.of(SOURCES / "all_reduce.cu", SOURCES / "rms_norm.cu").library)
    yield
    library.use(None)


def measured(one_shot: float, two_shot: float) -> dict[str, dict[int, float]]:
    return {
        ONE_SHOT: dict.fromkeys(SIZES[:-2], one_shot),
        TWO_SHOT: dict.fromkeys(SIZES, two_shot),
        OTHERWISE: dict.fromkeys(SIZES, 3.0),
    }


def connect(rank: int, gather: Gather) -> ShortSums | None:
    return short_sums.connect(rank, CPU, gather, lambda values: None)


def test_ranks_that_reach_each_other_choose_the_same(kernels: None) -> None:
    sums = on_all_ranks(connect)
    assert all(each.choice == sums[0].choice for each in sums)
    assert sums[0].choice.method(SIZES[0]) == TWO_SHOT
    for each in sums:
        each.close()


def test_ranks_try_the_kernels_themselves(kernels: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Memory that is opened by its handles, in which kernels of all ranks run at the same time."""
    barrier, lock = threading.Barrier(RANKS), threading.Lock()
    emulated = emulator.of(SOURCES / "all_reduce.cu", SOURCES / "rms_norm.cu")

    class Peers(PeerSums):
        def sum(self, values: Tensor, *, two_shot: bool) -> None:
            rank = self._args.rank
            with lock, emulated.device(rank):
                super().sum(values, two_shot=two_shot)
            if barrier.wait(20) == 0:
                emulated.run_devices()
            barrier.wait(20)

    monkeypatch.setattr(short_sums, "PeerSums", Peers)
    monkeypatch.setattr(short_sums, "try_sums", try_sums)
    monkeypatch.setattr(short_sums, "_TRIED_SIZES", (16, 8192, 80, 16))
    for each in on_all_ranks(connect):
        each.close()

    # A card whose writes another does not get.
    def elsewhere(device: torch.device, handle: bytes) -> Any:
        return Inbox(device)

    monkeypatch.setattr(short_sums, "OpenInbox", elsewhere)
    monkeypatch.setattr(Inbox, "close", Inbox.free, raising=False)
    monkeypatch.setattr(short_sums, "_TRIAL_S", 0.05)
    assert on_all_ranks(connect) == [None] * RANKS


def fail(*arguments: Any) -> None:
    raise RuntimeError("it does not work")


def only_on(rank: int, what: Callable[..., Any], otherwise: Callable[..., Any]) -> Any:
    """Something that one of the ranks does, and another thing that others do."""
    calls = iter(range(RANKS))
    lock = threading.Lock()

    def run(*arguments: Any) -> Any:
        with lock:
            number = next(calls)
        return (what if number == rank else otherwise)(*arguments)

    return run


@pytest.mark.parametrize("step", ["Inbox", "_open", "try_sums", "_measure", "_machine"])
def test_what_fails_on_one_rank_is_given_up_by_all(
    kernels: None, monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    def fails(*arguments: Any) -> Any:
        if step == "_machine":
            return "another one"
        return fail()

    monkeypatch.setattr(short_sums, step, only_on(1, fails, getattr(short_sums, step)))
    assert on_all_ranks(connect) == [None] * RANKS


def test_without_kernels_ranks_go_without(caplog: pytest.LogCaptureFixture) -> None:
    library.use(None, "there is no nvcc")
    with caplog.at_level("INFO"):
        assert on_all_ranks(connect) == [None] * RANKS
    assert "sums over ranks by our own kernels: none: there is no nvcc" in caplog.text
    library.use(None)


def test_more_ranks_than_kernels_know_go_without(kernels: None) -> None:
    assert on_all_ranks(connect, 9) == [None] * 9


def test_the_method_of_a_sum_is_the_fastest_of_the_next_size_that_was_measured() -> None:
    def durations(slow: float) -> Mapping[str, Mapping[int, float]]:
        return {
            ONE_SHOT: {4096: 1.0, 8192: 2.0 * slow},
            TWO_SHOT: {4096: 2.0, 8192: 3.0, 16384: 9.0},
            OTHERWISE: {4096: 5.0, 8192: 5.0, 16384: 5.0},
        }

    choice = Choice.of(slowest([durations(1.0), durations(1.0)]))
    sizes = [16, 4096, 4112, 8192, 8208, 2**30]
    expected = [ONE_SHOT, ONE_SHOT, ONE_SHOT, ONE_SHOT, OTHERWISE, OTHERWISE]
    assert [choice.method(each) for each in sizes] == expected
    assert str(choice) == "up to 8 KiB by one shot"
    # What is slow on one rank is slow for all.
    choice = Choice.of(slowest([durations(1.0), durations(2.0)]))
    assert choice.method(8192) == TWO_SHOT
    assert str(choice) == "up to 4 KiB by one shot, up to 8 KiB by two shots"
    nothing = {OTHERWISE: {4096: 1.0}, ONE_SHOT: {4096: 2.0}}
    assert str(Choice.of(nothing)) == "none"


class PeersInThreads:
    """Sums by way of the host; `spoil` changes what arrives."""

    def __init__(self, rank: int, gather: Gather, spoil: Callable[[Tensor], object]) -> None:
        self.num_ranks, self.has_timed_out = RANKS, False
        self._gather, self._spoil = gather, spoil

    def sum(self, values: Tensor, *, two_shot: bool) -> None:
        parts = self._gather(values.clone())
        values.copy_(torch.stack(parts).float().sum(0))
        self._spoil(values)


def test_sums_that_are_tried_have_to_be_right() -> None:
    def run(spoil: Callable[[Tensor], object]) -> list[None]:
        return on_all_ranks(
            lambda rank, gather: try_sums(PeersInThreads(rank, gather, spoil), rank, CPU)
        )

    run(lambda values: None)
    with pytest.raises(ValueError, match="arrives as something else"):
        run(lambda values: values[-1:].add_(1))


def test_ranks_that_are_abandoned_wait_for_no_sum(monkeypatch: pytest.MonkeyPatch) -> None:
    done = []

    class Sums:
        def abandon(self) -> None:
            done.append("abandoned")

        def close(self) -> None:
            done.append("closed")

    monkeypatch.setattr(ranks, "_short_sums", Sums())
    ranks.abandon()
    ranks.leave()
    ranks.leave()
    assert done == ["abandoned", "closed"]


def test_sums_that_are_not_chosen_are_left_to_others() -> None:
    class Peers:
        def __init__(self) -> None:
            self.calls: list[tuple[int, bool]] = []

        def sum(self, values: Tensor, *, two_shot: bool) -> None:
            self.calls.append((values.nbytes, two_shot))

    peers: Any = Peers()
    seconds = {
        ONE_SHOT: {4096: 1.0, 8192: 3.0, 16384: 9.0},
        TWO_SHOT: {4096: 2.0, 8192: 2.0, 16384: 9.0},
        OTHERWISE: {4096: 3.0, 8192: 3.0, 16384: 3.0},
    }
    sums = ShortSums(peers, [], None, seconds)
    taken = [sums.sum(torch.zeros(each, dtype=torch.bfloat16)) for each in (8, 4096, 8192, 2**15)]
    assert taken == [True, True, False, False]
    assert peers.calls == [(16, False), (8192, True)]
    assert not sums.sum(torch.zeros(8, dtype=torch.int32))
