"""ggml's storage types in groups of 32, read with their own levels, scales and minima.

Block layouts as in dequantize.py. Scales and minima are halves. In Q4_K, Q5_K and IQ4_XS they are
products of a half and six bits, which a half holds to one part in 2048; all others are exact. Types
with groups of 16 (Q2_K, Q3_K, Q6_K) are not among these.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from services.engine.core.kernels.cpu.packing import GroupedWeight
from services.engine.core.weights.dequantize import (
    fifth_bits,
    iq4_values,
    iq4_xs_scales,
    nibbles,
    q4_k_levels,
    q5_k_levels,
    six_bit_scales,
)
from services.engine.core.weights.mapped_tensors import as_tensor
from services.runtime.modelfiles.ggml_types import GGMLType

# (levels [num_blocks, groups, 32], scales and minima [num_blocks, groups] or None, bits)
_Parts = tuple[Tensor, Tensor, Tensor | None, int]


def read_grouped(raw: np.ndarray, storage: GGMLType, shape: tuple[int, ...]) -> GroupedWeight:
    """Return a stored matrix in its own precision.

    raw: uint8 [nbytes], as stored; shape: outputs and inputs. Raises KeyError for a type that is
    not in GROUPED.
    """
    blocks = as_tensor(raw.reshape(-1, storage.block_bytes))
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


def _centred(values: Tensor) -> Tensor:
    """Signed bytes as levels around 128: flipping the sign bit adds that much."""
    return values.view(torch.uint8) ^ 0x80


def _q8_0(blocks: Tensor) -> _Parts:
    return _centred(blocks[:, 2:]), _half(blocks, 0), None, 8


def _scaled_k(blocks: Tensor, levels: Tensor, bits: int) -> _Parts:
    scales, minima = six_bit_scales(blocks[:, 4:16])
    products = scales * _half(blocks, 0).float(), minima * -_half(blocks, 2).float()
    return levels, products[0].half(), products[1].half(), bits


def _q4_k(blocks: Tensor) -> _Parts:
    return _scaled_k(blocks, q4_k_levels(blocks), 4)


def _q5_k(blocks: Tensor) -> _Parts:
    return _scaled_k(blocks, q5_k_levels(blocks), 8)


def _iq4_nl(blocks: Tensor) -> _Parts:
    return _centred(iq4_values(blocks[:, 2:])), _half(blocks, 0), None, 8


def _iq4_xs(blocks: Tensor) -> _Parts:
    levels = _centred(iq4_values(blocks[:, 8:].reshape(-1, 16)))
    return levels, (iq4_xs_scales(blocks) * _half(blocks, 0).float()).half(), None, 8


GROUPED: dict[str, Callable[[Tensor], _Parts]] = {
    "Q4_0": _q4_0,
    "Q4_1": _q4_1,
    "Q5_0": _q5_0,
    "Q5_1": _q5_1,
    "Q8_0": _q8_0,
    "Q4_K": _q4_k,
    "Q5_K": _q5_k,
    "IQ4_NL": _iq4_nl,
    "IQ4_XS": _iq4_xs,
}
