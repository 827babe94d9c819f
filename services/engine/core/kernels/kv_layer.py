"""How the paged cache keeps the keys and values of one layer."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

FP8_MAX = torch.finfo(torch.float8_e4m3fn).max
INT8_MAX = 127


@dataclass(frozen=True, slots=True)
class KVLayer:
    """Keys and values of one layer, in blocks.

    Attributes:
        keys, values: [num_blocks, block_size, kv_heads, head_dim], in the precision of the model,
            in float8_e4m3fn or in int8.
        key_scales, value_scales: [num_blocks, block_size, kv_heads] float32, of int8 alone: what an
            element stands for is element * scale. Eight-bit floats stand for themselves.
    """

    keys: Tensor
    values: Tensor
    key_scales: Tensor | None = None
    value_scales: Tensor | None = None


def quantize_heads(heads: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor | None]:
    """Round vectors, [num_tokens, kv_heads, head_dim], to what a cache of `dtype` keeps.

    Returns them, and their scales, [num_tokens, kv_heads] float32, where the format has any: the
    largest element of a vector becomes 127. Eight-bit floats saturate.
    """
    if dtype == torch.int8:
        scales = heads.float().abs().amax(-1) / INT8_MAX
        divisors = torch.where(scales > 0, scales, 1.0).unsqueeze(-1)
        return torch.round(heads.float() / divisors).to(torch.int8), scales
    if dtype == torch.float8_e4m3fn:
        return heads.float().clamp(-FP8_MAX, FP8_MAX).to(dtype), None
    return heads, None
