"""Blocks of the cache are moved by kernels as by their references, and nothing else is touched."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from services.engine.core.host_blocks import HostBlocks
from services.engine.core.kernels import copy_blocks, swap_blocks
from services.engine.core.kv_cache import KVCache

NUM_BLOCKS = 7
CASES = settings(max_examples=15, deadline=None)
CACHES = st.builds(
    lambda layers, block_size, kv_heads, head_dim, dtype: KVCache(
        layers, NUM_BLOCKS, block_size, kv_heads, head_dim, dtype, "cpu"
    ),
    st.integers(1, 3),
    st.sampled_from([1, 4, 16]),
    st.sampled_from([1, 2, 5]),
    st.sampled_from([8, 64, 96]),
    st.sampled_from([torch.bfloat16, torch.float32, torch.int8, torch.float8_e4m3fn]),
)


@pytest.fixture(scope="module", autouse=True)
def kernels() -> Iterator[None]:
    for op in (copy_blocks, swap_blocks):
        assert op.select("cuda", tensors_on="cpu").implementation == "triton"
    yield
    for op in (copy_blocks, swap_blocks):
        op.select("cpu")


def fill(cache: KVCache) -> None:
    for part in cache.parts:
        if part is not None:
            part.view(torch.uint8).random_(0, 100)


def block(cache: KVCache, index: int) -> list[torch.Tensor]:
    """All that a block has, as bytes."""
    parts = [each for each in cache.parts if each is not None]
    return [each.view(torch.uint8)[:, :, index].clone() for each in parts]


def same(one: list[torch.Tensor], other: list[torch.Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


@CASES
@given(cache=CACHES, order=st.permutations(range(NUM_BLOCKS + 1)), pairs=st.integers(0, 4))
def test_copies_have_what_their_sources_have(cache: KVCache, order: list[int], pairs: int) -> None:
    fill(cache)
    before = [block(cache, index) for index in range(NUM_BLOCKS + 1)]
    copied = dict(zip(order[:pairs], order[pairs : 2 * pairs], strict=True))
    cache.copy_blocks([*copied.items()])
    expected = dict(enumerate(before))
    expected |= {destination: before[source] for source, destination in copied.items()}
    for index, wanted in expected.items():
        assert same(block(cache, index), wanted)


@CASES
@given(cache=CACHES, order=st.permutations(range(NUM_BLOCKS)), count=st.integers(0, 4))
def test_what_is_saved_comes_back_elsewhere(cache: KVCache, order: list[int], count: int) -> None:
    fill(cache)
    host = HostBlocks(cache, 1 << 22)
    saved, free = order[:count], order[NUM_BLOCKS - count :]
    before = [block(cache, index) for index in saved]
    ticket = host.save(saved)
    assert ticket is not None
    fill(cache)
    untouched = {i: block(cache, i) for i in range(NUM_BLOCKS + 1) if i not in free}
    host.restore(ticket, free)
    host.join()
    for index, wanted in zip(free, before, strict=True):
        assert same(block(cache, index), wanted)
    for index, wanted in untouched.items():
        assert same(block(cache, index), wanted)


def test_kernels_lay_out_rows_as_the_reference_does() -> None:
    cache = KVCache(2, NUM_BLOCKS, 4, 2, 24, torch.int8, "cpu")
    fill(cache)
    storage, scales = cache.parts
    assert scales is not None
    row_bytes = storage[:, :, 0].nbytes + scales[:, :, 0].nbytes
    found, expected = (torch.full((5, row_bytes), 255, dtype=torch.uint8) for _ in range(2))
    blocks, rows = torch.tensor([6, 0, 3]), torch.tensor([1, 4, 0])
    swap_blocks(storage, scales, blocks, found, rows, to_host=True)
    swap_blocks.reference(storage, scales, blocks, expected, rows, to_host=True)
    assert torch.equal(found, expected)
    assert (found[2:4] == 255).all()
