"""Attention of one layer: writes the step's keys and values to its cache and attends over it."""

from __future__ import annotations

from torch import Tensor, nn

from services.engine.core.kernels import AttentionMetadata, paged_attention, write_kv
from services.engine.core.kv_cache import KVCache


class PagedAttention(nn.Module):
    """Scaled dot-product attention over the paged cache of layer `layer_index`."""

    def __init__(self, layer_index: int, head_dim: int) -> None:
        super().__init__()
        self.layer_index = layer_index
        self.scale = head_dim**-0.5

    def forward(
        self,
        queries: Tensor,
        keys: Tensor,
        values: Tensor,
        kv_cache: KVCache,
        slots: Tensor,
        metadata: AttentionMetadata,
    ) -> Tensor:
        """queries: [num_tokens, heads, head_dim], keys and values: [num_tokens, kv_heads,
        head_dim], slots: [num_tokens] -> [num_tokens, heads * head_dim]."""
        key_cache = kv_cache.keys[self.layer_index]
        value_cache = kv_cache.values[self.layer_index]
        write_kv(keys, values, key_cache, value_cache, slots)
        return paged_attention(queries, key_cache, value_cache, metadata, self.scale).flatten(1)
