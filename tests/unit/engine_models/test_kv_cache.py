"""The KV cache takes the memory it says it takes, and starts without a NaN in it."""

from __future__ import annotations

import pytest
import torch

from services.engine.core.kv_cache import KVCache


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float8_e4m3fn, torch.int8])
def test_a_block_takes_what_bytes_per_block_says(dtype: torch.dtype) -> None:
    cache = KVCache(3, 7, 16, 2, 8, dtype, "cpu")
    assert len(cache.layers) == 3
    pools = [pool for layer in cache.layers for pool in (layer.keys, layer.values)]
    assert all(pool.shape == (8, 16, 2, 8) and pool.is_contiguous() for pool in pools)
    scales = [each.key_scales for each in cache.layers] + [e.value_scales for e in cache.layers]
    parts = pools + [each for each in scales if each is not None]
    taken_bytes = sum(part.numel() * part.element_size() for part in parts)
    # Those of the pool, and the one that padding is written to.
    assert taken_bytes == 8 * KVCache.bytes_per_block(3, 16, 2, 8, dtype)
    assert all(part.float().count_nonzero() == 0 for part in parts)
