"""The paged KV cache as the native kernels read it; src/kv_layout.h describes the layout."""

from __future__ import annotations

import ctypes
from collections.abc import Iterable, Sequence
from enum import IntEnum
from typing import Any, ClassVar

import torch
from torch import Tensor

from services.engine.core.kernels.cpu.pages import zero_pages
from services.engine.core.layer_groups import LayerGroups

TILE_TOKENS = 16
# What the kernels' buffers for one vector hold.
MAX_HEAD_DIM = 512


class KvFormat(IntEnum):
    """How keys and values are stored, `enum class KvFormat` of src/kv_layout.h.

    INT8 takes a little over half the memory of BF16: eight bits an element, and a scale for each
    token's key and value in each KV head.
    """

    BF16 = 0
    INT8 = 1


class KvLayout(ctypes.Structure):
    """`struct KvLayout` of src/kv_layout.h: the cache of one layer."""

    _fields_ = (
        ("keys", ctypes.c_void_p),
        ("values", ctypes.c_void_p),
        ("block_stride", ctypes.c_int64),
        ("block_size", ctypes.c_int32),
        ("kv_heads", ctypes.c_int32),
        ("head_dim", ctypes.c_int32),
        ("format", ctypes.c_int32),
        ("group", ctypes.c_int32),
    )


class StepView(ctypes.Structure):
    """`struct StepView` of src/kv_layout.h."""

    # Named, for a structure that begins with this one has fields of its own.
    _fields_: ClassVar[Sequence[tuple[str, Any]]] = (
        ("num_tokens", ctypes.c_int32),
        ("num_sequences", ctypes.c_int32),
        ("positions", ctypes.c_void_p),
        ("slots", ctypes.c_void_p),
        ("query_starts", ctypes.c_void_p),
        ("context_lengths", ctypes.c_void_p),
        ("block_tables", ctypes.c_void_p),
        ("table_stride", ctypes.c_int32),
        ("group_slots", ctypes.c_int64),
        ("group_tables", ctypes.c_int64),
    )


def check_head_dim(head_dim: int) -> None:
    """Raise ValueError for heads of a size that the kernels do not serve."""
    if head_dim % 16 or not 0 < head_dim <= MAX_HEAD_DIM:
        raise ValueError(f"head_dim is a multiple of 16 of at most {MAX_HEAD_DIM}, not {head_dim}")


class PackedKVCache:
    """Keys and values of all sequences and layers, in blocks of `block_size` tokens.

    A block's keys and values of all layers of a group lie together, so that a block is copied in
    one piece, and few blocks in use touch little memory. Pages are the operating system's zeros
    until they are written, so that a large pool costs nothing before it is used. What a freed block
    holds stays there; the kernels never let it reach a result.

    Raises ValueError for sizes that the kernels do not serve and MemoryError where the pool does
    not fit.
    """

    def __init__(
        self,
        num_layers: int,
        num_blocks: int,
        block_size: int,
        kv_heads: int,
        head_dim: int,
        kv_format: KvFormat = KvFormat.BF16,
        groups: LayerGroups | None = None,
    ) -> None:
        """groups: of the layers; by default all are in one."""
        if block_size % TILE_TOKENS or block_size <= 0:
            raise ValueError(f"a block holds a multiple of {TILE_TOKENS} tokens, not {block_size}")
        check_head_dim(head_dim)
        self.num_layers = num_layers
        self.num_blocks = num_blocks
        self.block_size = block_size
        self.kv_heads = kv_heads
        self.head_dim = head_dim
        self.kv_format = kv_format
        self.groups = groups or LayerGroups.single(num_layers)
        places = self.groups.layers_per_block
        self._part_bytes = _part_bytes(block_size, kv_heads, head_dim, kv_format)
        self._block_bytes = 2 * places * self._part_bytes
        # [num_blocks, place of a layer, keys or values, bytes]
        self._storage = zero_pages(num_blocks * self._block_bytes).reshape(
            num_blocks, places, 2, self._part_bytes
        )

    @staticmethod
    def bytes_per_block(
        num_layers: int,
        block_size: int,
        kv_heads: int,
        head_dim: int,
        kv_format: KvFormat = KvFormat.BF16,
    ) -> int:
        """Return what one block of so many layers takes, keys and values, in bytes."""
        return 2 * num_layers * _part_bytes(block_size, kv_heads, head_dim, kv_format)

    def layer(self, index: int) -> tuple[int, int]:
        """Return the addresses of block 0's keys and values in a layer."""
        keys = self._storage.ctypes.data + 2 * self.groups.place_of_layer[index] * self._part_bytes
        return keys, keys + self._part_bytes

    def layout(self, index: int) -> KvLayout:
        """Return a layer as the kernels take it; the addresses live as long as this cache."""
        keys, values = self.layer(index)
        return KvLayout(
            keys,
            values,
            self._block_bytes,
            self.block_size,
            self.kv_heads,
            self.head_dim,
            int(self.kv_format),
            self.groups.group_of_layer[index],
        )

    def copy_blocks(self, pairs: Iterable[tuple[int, int]]) -> None:
        """Copy whole blocks, (source, destination), all of their layers."""
        for source, destination in pairs:
            self._storage[destination] = self._storage[source]

    def read(self, layer: int, slots: Tensor) -> tuple[Tensor, Tensor]:
        """Return the keys and values in `slots` [n] as float32 [n, kv_heads, head_dim].

        For tests and tools: the kernels read the cache where it is.
        """
        blocks, offsets = slots // self.block_size, slots % self.block_size
        tiles, tokens = offsets // TILE_TOKENS, offsets % TILE_TOKENS
        parts = torch.from_numpy(self._storage[:, self.groups.place_of_layer[layer]])[blocks]
        shape = (len(slots), 2, self.kv_heads, self.block_size // TILE_TOKENS, -1)
        rows = torch.arange(len(slots))
        found = parts.view(shape)[rows, :, :, tiles]  # [n, 2, kv_heads, tile bytes]
        if self.kv_format == KvFormat.INT8:
            elements = TILE_TOKENS * self.head_dim
            scales = found[..., elements:].contiguous().view(torch.float32)
            values = found[..., :elements].view(torch.int8).float()
            values *= scales[rows, :, :, tokens].unsqueeze(-1)
        else:
            values = found.view(torch.bfloat16).float()
        by_pair = (len(slots), self.kv_heads, self.head_dim // 2, TILE_TOKENS, 2)
        by_token = (len(slots), self.kv_heads, TILE_TOKENS // 2, self.head_dim, 2)
        return (
            values[:, 0].reshape(by_pair)[rows, :, :, tokens].flatten(2),
            values[:, 1].reshape(by_token)[rows, :, tokens // 2, :, tokens % 2],
        )

    def fill(self, byte: int) -> None:
        """Set every byte of the pool: for tests of what stale memory may do (0xff is NaN)."""
        self._storage.fill(byte)


def _part_bytes(block_size: int, kv_heads: int, head_dim: int, kv_format: KvFormat) -> int:
    """Bytes of one block's keys, or values, in one layer."""
    elements = TILE_TOKENS * head_dim
    tile = elements * 2 if kv_format == KvFormat.BF16 else elements + 4 * TILE_TOKENS
    return block_size // TILE_TOKENS * kv_heads * tile
