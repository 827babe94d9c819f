"""ggml's storage types in groups of 32, read as levels, scales and minima without rounding.

Block layouts as in dequantize.py. The K types are not among these: the scale of one of their groups
is a product of two numbers, which a half does not hold.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from services.engine.core.kernels.cpu.packing import GroupedWeight
from services.engine.core.weights.dequantize import fifth_bits, nibbles
from services.runtime.modelfiles.ggml_types import GGMLType

# (levels [num_blocks, 32], scales [num_blocks, 1], minima [num_blocks, 1] or None, bits)
_Parts = tuple[Tensor, Tensor, Tensor | None, int]


def read_grouped(raw: np.ndarray, storage: GGMLType, shape: tuple[int, ...]) -> GroupedWeight:
    """Return a stored matrix in its own precision.

    raw: uint8 [nbytes], as stored; shape: outputs and inputs. Raises KeyError for a type that is
    not in GROUPED.
    """
    blocks = torch.from_numpy(raw.reshape(-1, storage.block_bytes).copy())
    levels, scales, minima, bits = GROUPED[storage.name](blocks)
    outputs = shape[0]
    return GroupedWeight(
        levels.view(outputs, -1),
        scales.reshape(outputs, -1),
        None if minima is None else minima.reshape(outputs, -1),
        bits,
    )


def _half(blocks: Tensor, start: int) -> Tensor:
    return blocks[:, start : start + 2].contiguous().view(torch.float16)


def _q4_0(blocks: Tensor) -> _Parts:
    scales = _half(blocks, 0)
    return nibbles(blocks[:, 2:]), scales, scales * -8, 4


def _q4_1(blocks: Tensor) -> _Parts:
    return nibbles(blocks[:, 4:]), _half(blocks, 0), _half(blocks, 2), 4


def _q5_0(blocks: Tensor) -> _Parts:
    scales = _half(blocks, 0)
    levels = nibbles(blocks[:, 6:]) | fifth_bits(blocks[:, 2:6])
    return levels, scales, scales * -16, 8


def _q5_1(blocks: Tensor) -> _Parts:
    levels = nibbles(blocks[:, 8:]) | fifth_bits(blocks[:, 4:8])
    return levels, _half(blocks, 0), _half(blocks, 2), 8


def _q8_0(blocks: Tensor) -> _Parts:
    # Flipping the sign bit of a two's complement byte adds 128 to it.
    return blocks[:, 2:] ^ 0x80, _half(blocks, 0), None, 8


GROUPED: dict[str, Callable[[Tensor], _Parts]] = {
    "Q4_0": _q4_0,
    "Q4_1": _q4_1,
    "Q5_0": _q5_0,
    "Q5_1": _q5_1,
    "Q8_0": _q8_0,
}
