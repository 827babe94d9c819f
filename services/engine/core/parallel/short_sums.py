"""Which sums over ranks are computed by our own kernels: short ones, where that is the fastest.

Ranks find that out together when they join: whether all of them see each other's memory, whether
sums of known numbers are right (there are machines whose switches lose what cards write to each
other), and how long a sum of each size takes by each method. All decide by what all have found,
and so alike: a rank that took another method would wait for ever.
"""

from __future__ import annotations

import contextlib
import logging
import socket
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

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
    """Connect the ranks of a stage, which all call this; None where our kernels do not serve them.

    rank: among them. sum_otherwise: sums in place over the same ranks, with which ours are
    compared.
    """
    own: list[Inbox] = []
    opened: list[OpenInbox] = []
    try:
        offers = _agree(gather, lambda: _offer(own, device))
        if not 1 < len(offers) <= MOST_RANKS:
            raise _RefusedError(f"there are {len(offers)} ranks")
        if len({machine for machine, _ in offers}) > 1:
            raise _RefusedError("ranks are on several machines")
        _agree(gather, lambda: _open(opened, rank, device, [handle for _, handle in offers]))
        addresses = [each.address for each in opened]
        addresses.insert(rank, own[0].address)
        peers = PeerSums(rank, addresses, device, patience_s=_TRIAL_S, traps=False)
        _agree(gather, lambda: try_sums(peers, rank, device))
        durations = _agree(gather, lambda: _measure(peers, device, sum_otherwise))
    except _RefusedError as refused:
        if rank == 0:
            logger.info("sums over ranks by our own kernels: none: %s", refused)
        for each in opened:
            each.close()
        gather(None)  # before memory goes that another rank has open
        for inbox in own:
            inbox.free()
        return None
    peers.wait(_PATIENCE_S, traps=True)
    sums = ShortSums(peers, opened, own[0], slowest(durations))
    if rank == 0:
        logger.info("sums over ranks by our own kernels: %s", sums.choice)
    return sums


class _RefusedError(Exception):
    """Our kernels do not serve these ranks. All of them raise it, or none."""


def _agree(gather: Gather, do: Callable[[], Any]) -> list[Any]:
    """What all ranks return of what each of them does.

    Raises:
        _RefusedError: it failed on one of them.
    """
    result, problem = None, ""
    try:
        result = do()
    except Exception as error:
        problem = f"{error}" if isinstance(error, _RefusedError) else repr(error)
    found = gather((result, problem))
    for _, each in found:
        if each:
            raise _RefusedError(each)
    return [each for each, _ in found]


def _offer(into: list[Inbox], device: torch.device) -> tuple[str, bytes]:
    """The machine that a rank is on, and the handle of its memory there."""
    if reason := why_not():
        raise _RefusedError(reason)
    into.append(Inbox(device))
    return _machine(), into[0].handle


def _machine() -> str:
    try:
        return _MACHINE.read_text()
    except OSError:
        return socket.gethostname()


def _open(into: list[OpenInbox], rank: int, device: torch.device, handles: Sequence[bytes]) -> None:
    """Open the memory of the other ranks."""
    for other, handle in enumerate(handles):
        if other != rank:
            into.append(OpenInbox(device, handle))


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
