"""Which sums over ranks are computed by our own kernels: short ones, where that is the fastest.

Ranks find that out together when they join: whether all of them see each other's memory, whether
sums of known numbers are right (there are machines whose switches lose what cards write to each
other), and how long a sum of each size takes by each method. All decide by what all have found,
and so alike: a rank that took another method would wait for ever.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from services.engine.core.kernels.cuda.all_reduce import (
    MOST_RANKS,
    Inbox,
    OpenInbox,
    PeerSums,
    holds,
    is_summable,
)
from services.engine.core.kernels.cuda.library import CudaError, why_not

logger = logging.getLogger(__name__)

T = TypeVar("T")

# What ranks of a stage send each other of one object each, in their order.
Gather = Callable[[Any], list[Any]]

ONE_SHOT, TWO_SHOT, OTHERWISE = "one shot", "two shots", "otherwise"
# Bytes of the sums that are measured: those of 1 to 64 tokens of usual hidden states.
SIZES = tuple(1 << bits for bits in range(12, 21))
_TRIED_SIZES = (16, 8192, 80, 65536)
_ROUNDS, _CALLS = 3, 20
# About 5 ms, in which the host launches all calls of a round: so it is the cards that are timed.
_HEAD_START_CYCLES = 10_000_000
_TRIAL_S = 20.0
# As long as torch.distributed waits for NCCL. A rank that is gone is found long before by rank 0,
# which ends the others: this is for one that is there and does nothing.
_PATIENCE_S = 600.0
# Seconds of a sum, by method and size.
Durations = Mapping[str, Mapping[int, float]]
# Linux makes one up at each start of a machine: containers on it have the same.
_MACHINE = Path("/proc/sys/kernel/random/boot_id")


@dataclass(frozen=True, slots=True)
class _Offer:
    """What a rank tells the others of itself."""

    problem: str
    machine: str = ""
    handle: bytes = b""


@dataclass(frozen=True, slots=True)
class Choice:
    """The fastest method for sums of up to so many bytes, by size."""

    methods: Mapping[int, str]

    @classmethod
    def of(cls, seconds: Durations) -> Choice:
        """Choose by what sums take."""
        methods = {}
        for size in seconds[OTHERWISE]:
            able = [method for method, sizes in seconds.items() if size in sizes]
            methods[size] = min(able, key=lambda method: seconds[method][size])
        return cls(methods)

    def method(self, num_bytes: int) -> str:
        """How to sum so many bytes: as the next larger size that was measured."""
        return next((how for size, how in self.methods.items() if num_bytes <= size), OTHERWISE)

    def __str__(self) -> str:
        parts, sizes = [], list(self.methods)
        for size, after in zip(sizes, [*sizes[1:], 0], strict=True):
            method = self.methods[size]
            if method != OTHERWISE and self.methods.get(after) != method:
                parts.append(f"up to {size // 1024} KiB by {method}")
        return ", ".join(parts) or "none"


def slowest(durations: Sequence[Durations]) -> Durations:
    """What sums take by what each rank has measured: one is over when it is on all ranks."""
    return {
        method: {size: max(each[method][size] for each in durations) for size in sizes}
        for method, sizes in durations[0].items()
    }


class ShortSums:
    """The sums of the ranks of a stage that our kernels compute.

    Attributes:
        seconds: what was measured.
        choice: what was chosen by it.
    """

    def __init__(
        self,
        peers: PeerSums,
        opened: Sequence[OpenInbox],
        inbox: Inbox | None,
        seconds: Durations,
    ) -> None:
        """inbox: of this rank, which others may write as long as this process runs."""
        self._peers, self._opened, self._inbox = peers, opened, inbox
        self.seconds = seconds
        self.choice = Choice.of(seconds)

    def sum(self, values: Tensor) -> bool:
        """Make `values` the sum over the ranks, in place, where that is chosen: whether it is is
        returned, alike on all ranks."""
        if not is_summable(values):
            return False
        method = self.choice.method(values.nbytes)
        if method == OTHERWISE:
            return False
        self._peers.sum(values, two_shot=method == TWO_SHOT)
        return True

    def abandon(self) -> None:
        """Have nobody wait for a rank any more, from any thread: sums are of no use then."""
        self._peers.abandon()

    def close(self) -> None:
        """See no more of other ranks' memory. One's own ends with the process: another rank may
        still be writing it."""
        for each in self._opened:
            with contextlib.suppress(CudaError):  # of a card that is of no more use
                each.close()


def connect(
    rank: int, device: torch.device, gather: Gather, sum_otherwise: Callable[[Tensor], object]
) -> ShortSums | None:
    """Connect the ranks of a stage, which all call this; None where there is nothing to gain.

    rank: among them. sum_otherwise: sums in place over the same ranks, with which ours are
    compared.
    """
    inbox, problem = _attempt(lambda: Inbox(device)) if not why_not() else (None, why_not() or "")
    offers: list[_Offer] = gather(
        _Offer(problem, _machine(), inbox.handle) if inbox else _Offer(problem)
    )
    problem = next((each.problem for each in offers if each.problem), "")
    if not 1 < len(offers) <= MOST_RANKS:
        problem = f"there are {len(offers)} ranks"
    elif not problem and len({each.machine for each in offers}) > 1:
        problem = "ranks are on several machines"
    opened: list[OpenInbox] = []
    if not problem:
        problem = _first(gather(_open(opened, rank, device, offers)))
    if not problem and inbox is not None:
        addresses = [each.address for each in opened]
        addresses.insert(rank, inbox.address)
        peers = PeerSums(rank, addresses, device, patience_s=_TRIAL_S, traps=False)
        problem = _first(gather(_attempt(lambda: try_sums(peers, rank, device))[1]))
        if not problem:
            measured, problem = _attempt(lambda: _measure(peers, device, sum_otherwise))
            found = gather((measured, problem))
            problem = _first([each for _, each in found])
            if not problem:
                sums = ShortSums(peers, opened, inbox, slowest([each for each, _ in found]))
                peers.wait(_PATIENCE_S, traps=True)
                if rank == 0:
                    logger.info("sums over ranks by our own kernels: %s", sums.choice)
                return sums
    if rank == 0:
        logger.info("sums over ranks by our own kernels: none: %s", problem)
    for each in opened:
        each.close()
    gather(None)  # before memory goes that another rank has open
    if inbox is not None:
        inbox.free()
    return None


def _machine() -> str:
    with contextlib.suppress(OSError):
        return _MACHINE.read_text()
    return ""


def _attempt(what: Callable[[], T]) -> tuple[T | None, str]:
    """What something returns, and what went wrong. The other ranks wait to be told either way."""
    try:
        return what(), ""
    except Exception as error:
        return None, f"{type(error).__name__}: {error}"


def _open(into: list[OpenInbox], rank: int, device: torch.device, offers: Sequence[_Offer]) -> str:
    """Open the memory of the other ranks; returns what went wrong."""

    def open_all() -> None:
        for other, offer in enumerate(offers):
            if other != rank:
                into.append(OpenInbox(device, offer.handle))

    return _attempt(open_all)[1]


def _first(problems: Sequence[str]) -> str:
    return next(filter(None, problems), "")


def try_sums(peers: PeerSums, rank: int, device: torch.device) -> None:
    """Sum known numbers, often, without the host waiting in between.

    Raises:
        ValueError: a sum is wrong, or never comes.
    """
    ranks, made, right = peers.num_ranks, [], []
    for call, size in enumerate((*_TRIED_SIZES, 16 * ranks) * 4):
        # Whole numbers below 2^7: their sums are exact in bf16.
        numbers = torch.arange(size // 2, device=device) * 7 + call
        parts = [((numbers + 5 * each) % 15).to(torch.bfloat16) for each in range(ranks)]
        right.append(torch.stack(parts).float().sum(0).to(torch.bfloat16))
        made.append(parts[rank])
    for call, part in enumerate(made):
        peers.sum(part, two_shot=call % 2 == 1)
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    if peers.has_timed_out:
        raise ValueError("what ranks write to each other's memory does not arrive")
    if not all(torch.equal(*pair) for pair in zip(made, right, strict=True)):
        raise ValueError("what ranks write to each other's memory arrives as something else")


def _measure(
    peers: PeerSums, device: torch.device, sum_otherwise: Callable[[Tensor], object]
) -> dict[str, dict[int, float]]:
    """Seconds of a sum by method and size, as this rank finds them."""
    durations: dict[str, dict[int, float]] = {ONE_SHOT: {}, TWO_SHOT: {}, OTHERWISE: {}}
    for size in SIZES:
        values = torch.zeros(size // 2, dtype=torch.bfloat16, device=device)
        methods: dict[str, Callable[[Tensor], object]] = {OTHERWISE: sum_otherwise}
        if holds(size, peers.num_ranks, two_shot=False):
            methods[ONE_SHOT] = lambda values: peers.sum(values, two_shot=False)
        if holds(size, peers.num_ranks, two_shot=True):
            methods[TWO_SHOT] = lambda values: peers.sum(values, two_shot=True)
        for method, run in methods.items():
            durations[method][size] = min(_duration_s(run, values) for _ in range(_ROUNDS))
    if peers.has_timed_out:
        raise ValueError("what ranks write to each other's memory does not arrive")
    return durations


def _duration_s(run: Callable[[Tensor], object], values: Tensor) -> float:
    start, end = (
        torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        for _ in range(2)
    )
    torch.cuda._sleep(_HEAD_START_CYCLES)  # type: ignore[no-untyped-call]
    run(values)  # here ranks meet that come at different times
    start.record()
    for _ in range(_CALLS):
        run(values)
    end.record()
    end.synchronize()
    return float(start.elapsed_time(end)) / 1e3 / _CALLS
