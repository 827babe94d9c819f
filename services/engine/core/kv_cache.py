"""The paged KV cache: one pool of blocks of keys and values per layer."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from services.engine.core.layer_groups import LayerGroups


class KVCache:
    """Keys and values of all sequences, in blocks of `block_size` tokens.

    `keys[layer]` and `values[layer]` are [num_blocks, block_size, kv_heads, head_dim]; layers of
    different groups may have the same memory there, in which each block belongs to one of them.
    Which block belongs to which sequence is the block pool's knowledge, not the cache's. Blocks
    start as zeros: attention masks what it must not see, and a mask cannot hide a NaN.

    Raises torch.OutOfMemoryError (CUDA) or MemoryError (CPU) where the pool does not fit.
    """

    def __init__(
        self,
        num_layers: int,
        num_blocks: int,
        block_size: int,
        kv_heads: int,
        head_dim: int,
        dtype: torch.dtype,
        device: torch.device | str,
        groups: LayerGroups | None = None,
    ) -> None:
        """groups: of the layers; by default all are in one."""
        self.num_blocks = num_blocks
        self.block_size = block_size
        self.groups = groups or LayerGroups.single(num_layers)
        shape = (self.groups.layers_per_block, 2, num_blocks, block_size, kv_heads, head_dim)
        storage = _zeros(shape, dtype, torch.device(device))
        self._storage = storage
        self.keys: list[Tensor] = [storage[place, 0] for place in self.groups.place_of_layer]
        self.values: list[Tensor] = [storage[place, 1] for place in self.groups.place_of_layer]

    def copy_blocks(self, pairs: Sequence[tuple[int, int]]) -> None:
        """Copy whole blocks, given as (source, destination): all of their layers, keys and
        values."""
        sources, destinations = torch.tensor(pairs, device=self._storage.device).unbind(1)
        self._storage[:, :, destinations] = self._storage[:, :, sources]

    @staticmethod
    def bytes_per_block(
        num_layers: int, block_size: int, kv_heads: int, head_dim: int, dtype: torch.dtype
    ) -> int:
        """Return what one block of so many layers takes, keys and values, in bytes."""
        return 2 * num_layers * block_size * kv_heads * head_dim * dtype.itemsize


def _zeros(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    if device.type != "cpu":
        return torch.zeros(shape, dtype=dtype, device=device)
    # torch writes its zeros, numpy asks the kernel for pages that are zero: gigabytes of cache cost
    # neither start-up time nor memory before a sequence uses them.
    pages = np.zeros(math.prod(shape) * dtype.itemsize, np.uint8)
    return torch.from_numpy(pages).view(dtype).view(shape)
