"""The packed KV cache: what it costs, and whole blocks being copied."""

from __future__ import annotations

import itertools
import re
from pathlib import Path

import pytest
import torch

from services.engine.core.kernels.cpu.kv_cache import KvFormat, PackedKVCache

# Sizes of the demo model.
LAYERS, KV_HEADS, HEAD_DIM = 30, 3, 64


def resident_bytes() -> int:
    status = Path("/proc/self/status").read_text(encoding="utf-8")
    found = re.search(r"VmRSS:\s+(\d+) kB", status)
    assert found is not None
    return int(found[1]) * 1024


def test_a_pool_of_gigabytes_takes_no_memory_before_it_is_used() -> None:
    before = resident_bytes()
    cache = PackedKVCache(LAYERS, 20_000, 16, KV_HEADS, HEAD_DIM)
    assert cache.num_blocks * PackedKVCache.bytes_per_block(LAYERS, 16, KV_HEADS, HEAD_DIM) > 7e9
    cache.copy_blocks([(0, 1)])
    assert resident_bytes() - before < 32e6


def test_a_pool_that_does_not_fit_is_an_error_of_memory() -> None:
    with pytest.raises(MemoryError, match="not to be had"):
        PackedKVCache(LAYERS, 2**40, 16, KV_HEADS, HEAD_DIM)


@pytest.mark.parametrize("block_size", [16, 48])
def test_a_block_takes_two_bytes_an_element_or_one_and_its_scales(block_size: int) -> None:
    vectors = 2 * LAYERS * KV_HEADS * block_size

    def block(kv_format: KvFormat) -> int:
        return PackedKVCache.bytes_per_block(LAYERS, block_size, KV_HEADS, HEAD_DIM, kv_format)

    assert block(KvFormat.BF16) == vectors * HEAD_DIM * 2
    assert block(KvFormat.INT8) == vectors * (HEAD_DIM + 4)


@pytest.mark.parametrize("kv_format", list(KvFormat))
def test_each_part_of_the_pool_has_its_own_memory(kv_format: KvFormat) -> None:
    cache = PackedKVCache(3, 5, 32, 2, 16, kv_format)
    size = PackedKVCache.bytes_per_block(1, 32, 2, 16, kv_format) // 2
    starts = [
        address + block * cache.layout(layer).block_stride
        for layer in range(3)
        for address in cache.layer(layer)
        for block in range(5)
    ]
    starts.sort()
    assert all(start % 64 == 0 for start in starts)
    assert [later - start for start, later in itertools.pairwise(starts)] == [size] * 29


@pytest.mark.parametrize("kv_format", list(KvFormat))
def test_copying_a_block_copies_it_in_every_layer_and_nothing_else(kv_format: KvFormat) -> None:
    cache = PackedKVCache(2, 4, 16, 2, 16, kv_format)
    generator = torch.Generator().manual_seed(1)
    cache._storage[:] = torch.randint(
        0, 60, cache._storage.shape, dtype=torch.uint8, generator=generator
    ).numpy()
    slots = torch.arange(4 * 16)
    before = [torch.stack(cache.read(layer, slots)) for layer in range(2)]

    cache.copy_blocks([(2, 0), (2, 3)])

    for layer in range(2):
        old = before[layer].unflatten(1, (4, 16))
        after = torch.stack(cache.read(layer, slots)).unflatten(1, (4, 16))
        assert torch.equal(after, old[:, [2, 1, 2, 2]])


@pytest.mark.parametrize("sizes", [(8, 64), (0, 64), (16, 40), (16, 0), (16, 1024)])
def test_sizes_that_the_kernels_do_not_serve_are_refused(sizes: tuple[int, int]) -> None:
    block_size, head_dim = sizes
    with pytest.raises(ValueError, match=r"multiple of 16"):
        PackedKVCache(1, 1, block_size, 1, head_dim)
