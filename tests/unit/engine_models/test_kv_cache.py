"""The KV cache takes the memory it says it takes, and starts without a NaN in it."""

from __future__ import annotations

import torch

from services.engine.core.kv_cache import KVCache


def test_a_block_takes_what_bytes_per_block_says() -> None:
    cache = KVCache(3, 7, 16, 2, 8, torch.bfloat16, "cpu")
    pools = cache.keys + cache.values
    assert len(cache.keys) == len(cache.values) == 3
    assert all(pool.shape == (7, 16, 2, 8) and pool.is_contiguous() for pool in pools)
    taken_bytes = sum(pool.numel() * pool.element_size() for pool in pools)
    assert taken_bytes == 7 * KVCache.bytes_per_block(3, 16, 2, 8, torch.bfloat16)
    assert all(pool.count_nonzero() == 0 for pool in pools)
