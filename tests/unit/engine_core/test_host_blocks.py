"""What is saved to the host's memory stays what it was, whatever becomes of the blocks."""

from __future__ import annotations

import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule
from torch import Tensor

from services.engine.core.host_blocks import HostBlocks
from services.engine.core.kv_cache import KVCache

NUM_BLOCKS = 6
ROWS = 5


def cache_of(dtype: torch.dtype) -> KVCache:
    return KVCache(2, NUM_BLOCKS, 4, 2, 8, dtype, "cpu")


def contents(cache: KVCache, block: int) -> Tensor:
    """All that a block has, as bytes."""
    parts = [each for each in cache.parts if each is not None]
    return torch.cat([each.view(torch.uint8)[:, :, block].flatten() for each in parts])


class Swapping(RuleBasedStateMachine):
    """Saves, restores and drops in any order, against what a dictionary remembers."""

    def __init__(self) -> None:
        super().__init__()
        self.cache = cache_of(torch.int8)
        row_bytes = -(-len(contents(self.cache, 0)) // 128) * 128
        self.host = HostBlocks(self.cache, ROWS * row_bytes + row_bytes // 2)
        self.saved: dict[int, list[Tensor]] = {}

    @rule(block=st.integers(0, NUM_BLOCKS - 1))
    def compute(self, block: int) -> None:
        for part in self.cache.parts:
            assert part is not None
            part[:, :, block].view(torch.uint8).random_(0, 256)

    @rule(blocks=st.lists(st.integers(0, NUM_BLOCKS - 1), unique=True, max_size=4))
    def save(self, blocks: list[int]) -> None:
        room = ROWS - sum(len(each) for each in self.saved.values())
        assert self.host.num_free_blocks == room
        ticket = self.host.save(blocks)
        assert (ticket is None) == (len(blocks) > room)
        if ticket is not None:
            assert ticket not in self.saved
            self.saved[ticket] = [contents(self.cache, block) for block in blocks]

    @precondition(lambda self: self.saved)
    @rule(data=st.data(), order=st.permutations(range(NUM_BLOCKS)))
    def restore(self, data: st.DataObject, order: list[int]) -> None:
        ticket = data.draw(st.sampled_from(sorted(self.saved)))
        blocks = order[: len(self.saved[ticket])]
        others = {block: contents(self.cache, block) for block in order[len(blocks) :]}
        self.host.restore(ticket, blocks)
        self.host.join()
        for block, wanted in [*zip(blocks, self.saved[ticket], strict=True), *others.items()]:
            assert torch.equal(contents(self.cache, block), wanted)

    @precondition(lambda self: self.saved)
    @rule(data=st.data())
    def drop(self, data: st.DataObject) -> None:
        ticket = data.draw(st.sampled_from(sorted(self.saved)))
        del self.saved[ticket]
        self.host.drop(ticket)

    @invariant()
    def is_whole(self) -> None:
        self.host.check_integrity()


Swapping.TestCase.settings = settings(max_examples=40, stateful_step_count=25, deadline=None)
test_swapping = Swapping.TestCase


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU on this machine")
def test_copies_beside_steps_wait_for_what_came_before_and_are_waited_for() -> None:
    cache = KVCache(4, 64, 16, 8, 128, torch.bfloat16, "cuda")
    host = HostBlocks(cache, 64 << 20)
    storage, _ = cache.parts
    for repetition in range(20):
        delayed = torch.randn(4096, 4096, device="cuda").matmul(torch.randn(4096, 4096).cuda())
        storage[:, :, 5:25] = repetition + delayed.mean() * 0
        ticket = host.save(range(5, 25))
        assert ticket is not None
        host.join()
        storage[:, :, 5:25] = -1
        host.restore(ticket, range(30, 50))
        host.join()
        copied = storage[:, :, 30:50].clone()
        host.drop(ticket)
        assert (copied == repetition).all()
        assert (storage[:, :, 5:25] == -1).all()
        host.check_integrity()


def test_capacity_is_whole_blocks() -> None:
    cache = cache_of(torch.bfloat16)
    row_bytes = len(contents(cache, 0))
    host = HostBlocks(cache, 3 * row_bytes + 1)
    assert (host.num_blocks, host.capacity_bytes) == (3, 3 * row_bytes)


def test_a_row_that_two_tickets_claim_is_found() -> None:
    host = HostBlocks(cache_of(torch.bfloat16), 1 << 16)
    ticket = host.save([0, 1])
    assert ticket is not None
    host.drop(ticket)
    host._rows[ticket] = [0]
    with pytest.raises(AssertionError):
        host.check_integrity()


def test_what_is_restored_is_as_much_as_was_saved() -> None:
    host = HostBlocks(cache_of(torch.bfloat16), 1 << 16)
    ticket = host.save([0, 1])
    assert ticket is not None
    with pytest.raises(AssertionError, match="1 blocks for 2"):
        host.restore(ticket, [0])
