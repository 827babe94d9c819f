"""Sums over ranks in CUDA C++ are the same bits on all of them, however ranks and stores overtake
each other."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from services.engine.core.kernels.cuda import library
from services.engine.core.kernels.cuda.all_reduce import (
    SLOT_BYTES,
    Inbox,
    OpenInbox,
    PeerSums,
    holds,
    is_summable,
)
from services.engine.core.kernels.cuda.build import SOURCES
from services.engine.core.kernels.cuda.library import CudaError
from tests.fakes.cuda import emulator
from tests.fakes.cuda.emulator import OBJECTS, Emulator, guarded

SOURCE = SOURCES / "all_reduce.cu"
CPU = torch.device("cpu")
SLOT = 32768
DTYPES = [torch.bfloat16, torch.float16, torch.float32]


def kernels(source: Path = SOURCE) -> Emulator:
    return emulator.of(source, SOURCES / "rms_norm.cu")


class Cards:
    """The ranks of a stage, each with a card that the emulator runs."""

    def __init__(
        self,
        ranks: int,
        kernels: Emulator,
        slot_bytes: int = SLOT,
        patience_s: float = 60.0,
        traps: bool = True,
    ) -> None:
        self.kernels = kernels
        self.under_way: list[Sequence[Tensor]] = []
        nothing = torch.full((2 * slot_bytes // 4,), -1, dtype=torch.int32)
        self.inboxes = [guarded(nothing) for _ in range(ranks)]
        addresses = [each.data_ptr() for each in self.inboxes]
        self.peers = [
            PeerSums(
                rank, addresses, CPU, slot_bytes=slot_bytes, patience_s=patience_s, traps=traps
            )
            for rank in range(ranks)
        ]

    def sum(self, parts: Sequence[Tensor], *, two_shot: bool) -> None:
        """Launch the kernels that sum on all cards there are parts for."""
        self.under_way.append(parts)
        library.use(self.kernels.library)
        try:
            for rank, part in enumerate(parts):
                with self.kernels.device(rank):
                    self.peers[rank].sum(part, two_shot=two_shot)
        finally:
            library.use(None)

    def run(self, seed: int) -> None:
        with self.kernels.schedule(seed):
            self.kernels.run_devices()


def random_parts(ranks: int, vectors: int, dtype: torch.dtype) -> list[Tensor]:
    size = vectors * 16 // dtype.itemsize
    return [guarded(torch.randn(size).to(dtype)) for _ in range(ranks)]


def total(parts: Sequence[Tensor]) -> Tensor:
    """Their sum in float32, in the order of ranks."""
    result = parts[0].float()
    for part in parts[1:]:
        result = result + part.float()
    return result.to(parts[0].dtype)


@settings(max_examples=40, deadline=None)
@given(
    ranks=st.sampled_from([2, 3, 4, 8]),
    dtype=st.sampled_from(DTYPES),
    calls=st.lists(st.tuples(st.integers(1, 120), st.booleans()), min_size=1, max_size=7),
    seed=st.integers(0, 2**31),
)
def test_sums_that_follow_one_another_are_right_on_all_ranks(
    ranks: int, dtype: torch.dtype, calls: list[tuple[int, bool]], seed: int
) -> None:
    torch.manual_seed(seed)
    cards = Cards(ranks, kernels())
    everything = [random_parts(ranks, vectors, dtype) for vectors, _ in calls]
    expected = [total(parts) for parts in everything]
    # All are under way before any is done, and a card may be ahead of the others.
    for parts, (_, two_shot) in zip(everything, calls, strict=True):
        cards.sum(parts, two_shot=two_shot)
    cards.run(seed)
    for parts, right in zip(everything, expected, strict=True):
        assert all(torch.equal(part, right) for part in parts)
    assert all((inbox == -1).all() for inbox in cards.inboxes)


def test_blocks_of_several_warps_are_as_right() -> None:
    # Long enough for them, and longer than all blocks take at a time.
    cards, parts = Cards(2, kernels(), 2**19), random_parts(2, 2**14 + 3, torch.bfloat16)
    expected = total(parts)
    cards.sum(parts, two_shot=True)
    cards.run(0)
    assert all(torch.equal(part, expected) for part in parts)


@pytest.mark.parametrize("two_shot", [False, True])
def test_kernels_can_be_launched_again_as_they_are(two_shot: bool) -> None:
    # As a captured graph is: with nothing from the host but what was there the first time.
    cards = Cards(3, kernels())
    values = random_parts(3, 40, torch.float32)
    for seed in range(5):
        right = total(values)
        cards.sum(values, two_shot=two_shot)
        cards.run(seed)
        assert all(torch.equal(each, right) for each in values)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("two_shot", [False, True])
def test_numbers_that_are_none_are_summed_as_well(dtype: torch.dtype, two_shot: bool) -> None:
    # Also those whose bits stand for nothing that has arrived.
    cards = Cards(2, kernels())
    bits = torch.full((64,), -1, dtype=torch.int32)
    bits[1::4] = 0
    parts = [guarded(bits.view(dtype)), guarded(torch.zeros(64, dtype=torch.int32).view(dtype))]
    expected = total(parts)
    cards.sum(parts, two_shot=two_shot)
    cards.run(1)
    assert all(torch.equal(each.isnan(), expected.isnan()) for each in parts)
    assert all(torch.equal(each.nan_to_num(), expected.nan_to_num()) for each in parts)


MISTAKES = {
    "one slot for all calls": ("int(call % 2) * args.slot_vectors", "int(call * 0)"),
    "one word speaks for all four": (
        "words.x != kNothing && words.y != kNothing && words.z != kNothing && words.w != kNothing",
        "words.x != kNothing",
    ),
    "nothing is wiped": (
        "store_16_system(places + i * stride, {kNothing, kNothing, kNothing, kNothing});",
        "",
    ),
    "one block counts for all": (
        "blockIdx.x == 0 ? kCallUnits + 1 - gridDim.x : 1u",
        "blockIdx.x == 0 ? kCallUnits : 0u",
    ),
    "NaNs are sent as they are": ("word == kNothing ? kSentInstead : word", "word"),
}


@cache
def mistaken(mistake: str) -> Emulator:
    """The kernels with a mistake in them."""
    right, wrong = MISTAKES[mistake]
    text = SOURCE.read_text()
    assert text.count(right) == 1
    OBJECTS.mkdir(parents=True, exist_ok=True)
    source = OBJECTS / f"{mistake.replace(' ', '_')}.cu"
    source.write_text(text.replace(right, wrong))
    return kernels(source)


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistakes_are_found_by_some_order(mistake: str) -> None:
    def is_right(seed: int, two_shot: bool) -> bool:
        cards = Cards(3, mistaken(mistake), patience_s=0.2)
        everything = [random_parts(3, 40, torch.bfloat16) for _ in range(5)]
        everything[-1][0].view(torch.int32)[3] = -1
        expected = [total(parts) for parts in everything]
        for parts in everything:
            cards.sum(parts, two_shot=two_shot)
        try:
            cards.run(seed)
        except CudaError:
            return False
        return all(
            torch.equal(part.nan_to_num(), right.nan_to_num())
            for parts, right in zip(everything, expected, strict=True)
            for part in parts
        )

    for two_shot in (False, True):
        assert not all(is_right(seed, two_shot) for seed in range(1, 7))


def test_a_rank_that_never_comes_ends_those_that_wait() -> None:
    cards = Cards(3, kernels(), patience_s=0.05)
    cards.sum(random_parts(2, 20, torch.bfloat16), two_shot=False)
    with cards.kernels.fails("cudaErrorLaunchFailure", "a trap"):
        cards.run(1)


@pytest.mark.parametrize("two_shot", [False, True])
def test_where_ranks_try_each_other_a_kernel_that_waits_in_vain_just_ends(two_shot: bool) -> None:
    cards = Cards(3, kernels(), patience_s=0.05, traps=False)
    for _ in range(3):
        cards.sum(random_parts(2, 20, torch.bfloat16), two_shot=two_shot)
    cards.run(1)
    assert cards.peers[0].has_timed_out
    assert cards.peers[1].has_timed_out


def test_sums_that_are_abandoned_wait_for_nobody() -> None:
    cards = Cards(3, kernels(), patience_s=3600.0)
    cards.sum(random_parts(2, 20, torch.bfloat16), two_shot=True)
    for each in cards.peers:
        each.abandon()
    cards.run(1)
    assert not any(each.has_timed_out for each in cards.peers)


def test_memory_is_opened_by_its_handle() -> None:
    library.use(kernels().library)
    try:
        inbox = Inbox(CPU)
        opened = OpenInbox(CPU, inbox.handle)
        assert opened.address == inbox.address
        opened.close()
        inbox.free()
        with pytest.raises(CudaError, match="cudaErrorInvalidValue"):
            OpenInbox(CPU, bytes(64))
    finally:
        library.use(None)


@pytest.mark.parametrize("ranks", range(2, 9))
def test_a_slot_has_room_for_what_all_ranks_send(ranks: int) -> None:
    def needed(num_bytes: int, two_shot: bool) -> int:
        vectors = num_bytes // 16
        return 16 * (2 * ranks * -(-vectors // ranks) if two_shot else ranks * vectors)

    for two_shot in (False, True):
        sizes = range(16, SLOT_BYTES, 4096 + 16)
        for size in sizes:
            assert holds(size, ranks, two_shot=two_shot) == (needed(size, two_shot) <= SLOT_BYTES)
    assert holds(2**18, ranks, two_shot=False)


def unaligned(values: Tensor) -> Tensor:
    return torch.cat([values, values])[1 : 1 + len(values)]


@pytest.mark.parametrize(
    "make",
    [
        lambda: torch.zeros(64, dtype=torch.int32),
        lambda: torch.zeros(0).bfloat16(),
        lambda: torch.zeros(9).bfloat16(),
        lambda: torch.zeros(8, 16).bfloat16().T,
        lambda: unaligned(torch.zeros(64).bfloat16()),
    ],
    ids=["integers", "nothing", "an odd size", "not contiguous", "not aligned"],
)
def test_what_kernels_do_not_read_is_left_to_others(make: Callable[[], Tensor]) -> None:
    assert not is_summable(make())
    assert is_summable(torch.zeros(3, 64).half())
