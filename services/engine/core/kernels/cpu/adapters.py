"""Low-rank adapters as the native kernels take them; src/adapters.h describes the layouts."""

from __future__ import annotations

import ctypes
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from services.engine.core.kernels.cpu.packing import TILE_OUTPUTS
from services.engine.core.kernels.low_rank import LowRankPart


class AdapterPartStruct(ctypes.Structure):
    """`struct AdapterPart` of src/adapters.h."""

    _fields_ = (
        ("down", ctypes.c_void_p),
        ("up", ctypes.c_void_p),
        ("rank", ctypes.c_int32),
        ("first_shrunk", ctypes.c_int32),
        ("tiles", ctypes.c_int32),
        ("first_tile", ctypes.c_int32),
        ("tile_step", ctypes.c_int32),
    )


class AdapterLinearStruct(ctypes.Structure):
    """`struct AdapterLinear` of src/adapters.h."""

    _fields_ = (
        ("parts", ctypes.POINTER(AdapterPartStruct)),
        ("num_parts", ctypes.c_int32),
        ("rank_tiles", ctypes.c_int32),
    )


class StepAdapters(ctypes.Structure):
    """`struct StepAdapters` of src/adapters.h."""

    _fields_ = (
        ("of_sequence", ctypes.c_void_p),
        ("loaded", ctypes.POINTER(ctypes.POINTER(AdapterLinearStruct))),
    )


@dataclass(slots=True)
class AdaptedLinear:
    """A linear layer that adapters may change; `gated` as for `pack_bf16`.

    `path` is what the model calls it.

    Raises ValueError for a size that the kernels do not serve.
    """

    module: Any
    inputs: int
    outputs: int
    gated: bool
    path: str = ""

    def __post_init__(self) -> None:
        if self.outputs % TILE_OUTPUTS:
            raise ValueError(f"adapters change {TILE_OUTPUTS} outputs at a time")

    def width(self, rank: int) -> int:
        """The most that adapters of this rank make of a row, before it goes up again."""
        parts = len(getattr(self.module, "sizes", ()))
        # Of gates and values that are changed as one, each half has all ranks.
        return max(parts, 1 + self.gated) * _whole_tiles(rank)


class NativeAdapter:
    """An adapter packed for the kernels: what it does at each of a model's adapted layers."""

    def __init__(
        self, layers: Sequence[AdaptedLinear], parts: Mapping[int, Sequence[LowRankPart]]
    ) -> None:
        """parts: by the place of a layer in `layers`."""
        self._kept: list[Any] = []
        self.num_bytes = 0
        self.layers = (AdapterLinearStruct * len(layers))()
        for index, own in parts.items():
            self._fill(self.layers[index], layers[index], own)

    def _fill(
        self, struct: AdapterLinearStruct, layer: AdaptedLinear, own: Sequence[LowRankPart]
    ) -> None:
        # Gates and values lie apart, also where they are changed as one.
        half = layer.outputs // 2
        split = [piece for part in own for piece in (part.split(half) if layer.gated else (part,))]
        structs = (AdapterPartStruct * len(split))()
        shrunk = 0
        for to, part in zip(structs, split, strict=True):
            if part.first % TILE_OUTPUTS or len(part.up) % TILE_OUTPUTS:
                raise ValueError(f"adapters change {TILE_OUTPUTS} outputs at a time")
            to.down, to.up = self._pack(part.down), self._pack(part.up)
            to.rank, to.first_shrunk = _whole_tiles(len(part.down)), shrunk
            to.tiles = len(part.up) // TILE_OUTPUTS
            first, is_value = part.first, layer.gated and part.first >= half
            to.first_tile = (first - half * is_value) // TILE_OUTPUTS * (1 + layer.gated) + is_value
            to.tile_step = 1 + layer.gated
            shrunk += to.rank
        self._kept.append(structs)
        struct.parts = ctypes.cast(structs, ctypes.POINTER(AdapterPartStruct))
        struct.num_parts, struct.rank_tiles = len(split), shrunk // TILE_OUTPUTS

    def _pack(self, weight: Tensor) -> int:
        packed = _in_tiles(weight)
        self._kept.append(packed)
        self.num_bytes += packed.nbytes
        return packed.data_ptr()


def _in_tiles(weight: Tensor) -> Tensor:
    """bf16 [tiles of 16 outputs, pairs of inputs, 16, 2], padded with zeros to whole tiles."""
    outputs, inputs = weight.shape
    rows, columns = _whole_tiles(outputs), _whole_tiles(inputs)
    padded = torch.zeros(rows, columns, dtype=torch.bfloat16)
    padded[:outputs, :inputs] = weight
    tiles = padded.view(rows // TILE_OUTPUTS, TILE_OUTPUTS, columns // 2, 2)
    return tiles.permute(0, 2, 1, 3).contiguous()


def _whole_tiles(size: int) -> int:
    return -(-size // TILE_OUTPUTS) * TILE_OUTPUTS
