"""The paged KV cache: one pool of blocks of keys and values per layer."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from services.engine.core.kernels.blocks import copy_blocks
from services.engine.core.kernels.kv_layer import KVLayer
from services.engine.core.layer_groups import LayerGroups
from services.engine.core.settings import KVCacheFormat

_SCALE_BYTES = 4
_EIGHT_BITS = {"int8": torch.int8, "fp8": torch.float8_e4m3fn}


def kv_dtype(kv_format: KVCacheFormat, dtype: torch.dtype) -> torch.dtype:
    """What a cache of this format keeps for a model that computes in `dtype`."""
    return _EIGHT_BITS.get(kv_format, dtype)


class KVCache:
    """Keys and values of all sequences, in blocks of `block_size` tokens.

    `layers[layer]` are those of one layer; layers of different groups may have the same memory
    there, in which each block belongs to one of them. Which block belongs to which sequence is the
    block pool's knowledge, not the cache's. Blocks start as zeros: attention masks what it must not
    see, and a mask cannot hide a NaN.

    One block more than the pool's, the last, belongs to nobody: rows that pad a step write there.

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
        """dtype: of what is kept; int8 brings scales. groups: of the layers; by default all are in
        one."""
        self.num_blocks = num_blocks
        self.block_size = block_size
        self.groups = groups or LayerGroups.single(num_layers)
        shape = (self.groups.layers_per_block, 2, num_blocks + 1, block_size, kv_heads, head_dim)
        storage = _zeros(shape, dtype, torch.device(device))
        scales = None
        if dtype == torch.int8:
            scales = _zeros(shape[:-1], torch.float32, torch.device(device))
        # Of all layers: what they keep, and the scales where the format has any.
        self.parts = storage, scales
        self.layers: list[KVLayer] = [
            KVLayer(storage[place, 0], storage[place, 1])
            if scales is None
            else KVLayer(*storage[place].unbind(0), *scales[place].unbind(0))
            for place in self.groups.place_of_layer
        ]

    def clear(self) -> None:
        """Make all blocks zeros again."""
        for part in self.parts:
            if part is not None:
                part.zero_()

    def copy_blocks(self, pairs: Sequence[tuple[int, int]]) -> None:
        """Copy whole blocks, given as (source, destination): all of their layers, keys and
        values."""
        copy_blocks(*self.parts, *as_indices(pairs, self.parts[0].device))

    @staticmethod
    def bytes_per_block(
        num_layers: int, block_size: int, kv_heads: int, head_dim: int, dtype: torch.dtype
    ) -> int:
        """Return what one block of so many layers takes, keys and values, in bytes."""
        vector = head_dim * dtype.itemsize + (_SCALE_BYTES if dtype == torch.int8 else 0)
        return 2 * num_layers * block_size * kv_heads * vector


def as_indices(pairs: Sequence[tuple[int, int]], device: torch.device) -> tuple[Tensor, Tensor]:
    """The first and the second of each pair on a device, which is not waited for."""
    indices = torch.tensor(pairs, dtype=torch.int64).view(-1, 2).t().contiguous()
    if device.type == "cuda":
        indices = indices.pin_memory().to(device, non_blocking=True)
    first, second = indices.unbind()
    return first, second


def _zeros(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    if device.type != "cpu":
        return torch.zeros(shape, dtype=dtype, device=device)
    # torch writes its zeros, numpy asks the kernel for pages that are zero: gigabytes of cache cost
    # neither start-up time nor memory before a sequence uses them.
    pages = np.zeros(math.prod(shape) * dtype.itemsize, np.uint8)
    return torch.from_numpy(pages).view(dtype).view(shape)
