"""ggml's storage types turned back into float32.

Block layouts per the ggml quantisation formats as documented with GGUF
(https://github.com/ggml-org/ggml/blob/master/docs/gguf.md). Each function takes raw blocks, uint8
[num_blocks, block_bytes], and returns float32 [num_blocks, block_elements].
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from services.engine.core.weights.mapped_tensors import as_tensor
from services.runtime.modelfiles.ggml_types import GGMLType

# Dequantised at a time: small enough to stay in the caches, large enough to keep all cores busy.
_CHUNK_ELEMENTS = 1 << 21

# The levels of IQ4's uneven scale.
_IQ4_VALUES = (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)


def dequantize(raw: np.ndarray, storage: GGMLType, shape: tuple[int, ...]) -> Tensor:
    """Return a stored tensor as float32 of `shape`.

    raw: uint8 [nbytes], as stored. Raises KeyError for a type that is not in DEQUANTIZERS.
    """
    convert = DEQUANTIZERS[storage.name]
    blocks = raw.reshape(-1, storage.block_bytes)
    result = torch.empty(blocks.shape[0], storage.block_elements)
    step = max(_CHUNK_ELEMENTS // storage.block_elements, 1)
    for start in range(0, blocks.shape[0], step):
        result[start : start + step] = convert(as_tensor(blocks[start : start + step]))
    return result.view(shape)


def _half(blocks: Tensor, start: int) -> Tensor:
    """The float16 at byte `start` of each block, as float32 [num_blocks, 1]."""
    return blocks[:, start : start + 2].contiguous().view(torch.float16).float()


def _bits(packed: Tensor, width: int) -> Tensor:
    """Split bytes into fields of `width` bits, lowest first.

    [num_blocks, groups, bytes] -> [num_blocks, groups, 8 / width, bytes]
    """
    shifts = torch.arange(0, 8, width, dtype=torch.uint8).view(-1, 1)
    return (packed.unsqueeze(2) >> shifts) & ((1 << width) - 1)


def nibbles(packed: Tensor) -> Tensor:
    """32 four-bit values per block: the low nibbles of 16 bytes, then the high ones."""
    return _bits(packed.unsqueeze(1), 4).flatten(1)


def fifth_bits(packed: Tensor) -> Tensor:
    """32 single bits per block, each in the place of a fifth bit."""
    shifts = torch.arange(8, dtype=torch.uint8)
    return (((packed.unsqueeze(2) >> shifts) & 1) << 4).flatten(1)


def _f32(blocks: Tensor) -> Tensor:
    return blocks.view(torch.float32)


def _f16(blocks: Tensor) -> Tensor:
    return blocks.view(torch.float16).float()


def _bf16(blocks: Tensor) -> Tensor:
    return blocks.view(torch.bfloat16).float()


def _q4_0(blocks: Tensor) -> Tensor:
    return (nibbles(blocks[:, 2:]).float() - 8) * _half(blocks, 0)


def _q4_1(blocks: Tensor) -> Tensor:
    return nibbles(blocks[:, 4:]).float() * _half(blocks, 0) + _half(blocks, 2)


def _q5_0(blocks: Tensor) -> Tensor:
    quants = nibbles(blocks[:, 6:]) | fifth_bits(blocks[:, 2:6])
    return (quants.float() - 16) * _half(blocks, 0)


def _q5_1(blocks: Tensor) -> Tensor:
    quants = nibbles(blocks[:, 8:]) | fifth_bits(blocks[:, 4:8])
    return quants.float() * _half(blocks, 0) + _half(blocks, 2)


def _q8_0(blocks: Tensor) -> Tensor:
    return blocks[:, 2:].contiguous().view(torch.int8).float() * _half(blocks, 0)


def _q2_k(blocks: Tensor) -> Tensor:
    scales, packed = blocks[:, :16], blocks[:, 16:80]
    quants = _bits(packed.reshape(-1, 2, 32), 2).reshape(-1, 16, 16).float()
    scale = (scales & 0xF).float() * _half(blocks, 80)
    minimum = (scales >> 4).float() * _half(blocks, 82)
    return (quants * scale.unsqueeze(2) - minimum.unsqueeze(2)).flatten(1)


def _q3_k(blocks: Tensor) -> Tensor:
    high, packed, scales = blocks[:, :32], blocks[:, 32:96], blocks[:, 96:108]
    quants = _bits(packed.reshape(-1, 2, 32), 2).reshape(-1, 16, 16).float()
    # A high bit that is not set takes 4 off.
    third = _bits(high.unsqueeze(1), 1).reshape(-1, 16, 16).float() * 4 - 4
    low_four = _bits(scales[:, None, :8], 4).reshape(-1, 16)
    high_two = _bits(scales[:, None, 8:], 2).reshape(-1, 16)
    scale = ((low_four | (high_two << 4)).float() - 32) * _half(blocks, 108)
    return ((quants + third) * scale.unsqueeze(2)).flatten(1)


def six_bit_scales(packed: Tensor) -> tuple[Tensor, Tensor]:
    """Eight scales and eight minima of six bits each out of 12 bytes, [num_blocks, 8] each."""
    first, second, third = packed[:, :4], packed[:, 4:8], packed[:, 8:12]
    scales = torch.cat((first & 0x3F, (third & 0xF) | (first >> 6 << 4)), dim=1)
    minima = torch.cat((second & 0x3F, (third >> 4) | (second >> 6 << 4)), dim=1)
    return scales, minima


def _scaled_k(blocks: Tensor, quants: Tensor) -> Tensor:
    """Apply the common header of Q4_K and Q5_K to quants [num_blocks, 8, 32]."""
    scales, minima = six_bit_scales(blocks[:, 4:16])
    scale = scales.float() * _half(blocks, 0)
    minimum = minima.float() * _half(blocks, 2)
    return (quants.float() * scale.unsqueeze(2) - minimum.unsqueeze(2)).flatten(1)


def q4_k_levels(blocks: Tensor) -> Tensor:
    """Levels of four bits, [num_blocks, 8, 32]."""
    return _bits(blocks[:, 16:144].reshape(-1, 4, 32), 4).reshape(-1, 8, 32)


def q5_k_levels(blocks: Tensor) -> Tensor:
    """Levels of five bits, [num_blocks, 8, 32]."""
    low = _bits(blocks[:, 48:176].reshape(-1, 4, 32), 4).reshape(-1, 8, 32)
    return low | (_bits(blocks[:, None, 16:48], 1).reshape(-1, 8, 32) << 4)


def _q4_k(blocks: Tensor) -> Tensor:
    return _scaled_k(blocks, q4_k_levels(blocks))


def _q5_k(blocks: Tensor) -> Tensor:
    return _scaled_k(blocks, q5_k_levels(blocks))


def _q6_k(blocks: Tensor) -> Tensor:
    low = _bits(blocks[:, :128].reshape(-1, 2, 64), 4).reshape(-1, 2, 4, 32)
    high = _bits(blocks[:, 128:192].reshape(-1, 2, 32), 2)
    quants = (low | (high << 4)).reshape(-1, 16, 16).float() - 32
    scale = blocks[:, 192:208].contiguous().view(torch.int8).float() * _half(blocks, 208)
    return (quants * scale.unsqueeze(2)).flatten(1)


def iq4_values(packed: Tensor) -> Tensor:
    """What the nibbles of IQ4 stand for, int8 of the shape that `nibbles` gives."""
    return torch.tensor(_IQ4_VALUES, dtype=torch.int8)[nibbles(packed).int()]


def _iq4_nl(blocks: Tensor) -> Tensor:
    return iq4_values(blocks[:, 2:]).float() * _half(blocks, 0)


def iq4_xs_scales(blocks: Tensor) -> Tensor:
    """The six-bit scales of a block's eight groups, centred, int8 [num_blocks, 8]."""
    low_four = _bits(blocks[:, None, 4:8], 4).squeeze(1).transpose(1, 2).flatten(1)
    high_two = _bits(blocks[:, None, 2:4], 2).squeeze(1).transpose(1, 2).flatten(1)
    return (low_four | (high_two << 4)).to(torch.int8) - 32


def _iq4_xs(blocks: Tensor) -> Tensor:
    values = iq4_values(blocks[:, 8:].reshape(-1, 16)).view(-1, 8, 32).float()
    scale = iq4_xs_scales(blocks).float() * _half(blocks, 0)
    return (values * scale.unsqueeze(2)).flatten(1)


FLOATS = ("F32", "F16", "BF16")
DEQUANTIZERS: dict[str, Callable[[Tensor], Tensor]] = {
    "F32": _f32,
    "F16": _f16,
    "BF16": _bf16,
    "Q4_0": _q4_0,
    "Q4_1": _q4_1,
    "Q5_0": _q5_0,
    "Q5_1": _q5_1,
    "Q8_0": _q8_0,
    "Q2_K": _q2_k,
    "Q3_K": _q3_k,
    "Q4_K": _q4_k,
    "Q5_K": _q5_k,
    "Q6_K": _q6_k,
    "IQ4_NL": _iq4_nl,
    "IQ4_XS": _iq4_xs,
}
