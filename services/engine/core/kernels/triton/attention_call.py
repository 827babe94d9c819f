"""What the kernels of attention are called with, whichever of them it is."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from triton import language as tl

from services.engine.core.kernels.kv_layer import KVLayer
from services.engine.core.kernels.triton.attention_tiles import Card


@dataclass(frozen=True, slots=True)
class Pattern:
    """What a query sees, and how its products with keys become scores; see `paged_attention`."""

    scale: float
    window: int | None
    softcap: float | None
    global_tokens: int

    @property
    def constants(self) -> dict[str, int]:
        """Those that kernels are compiled for."""
        if self.window is None:
            return {"window": 0, "global_tokens": 0}
        return {"window": self.window, "global_tokens": self.global_tokens}


def stored(cache: KVLayer, card: Card) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """The tensors of a cache as the kernels read them on a card."""
    keys, values = cache.keys, cache.values
    if keys.dtype == torch.float8_e4m3fn and not card.converts_fp8:
        keys, values = keys.view(torch.uint8), values.view(torch.uint8)
    return keys, values, cache.key_scales, cache.value_scales


def strides(cache: KVLayer) -> tuple[int, ...]:
    """Of blocks, tokens and heads of keys and values, then of blocks and tokens of scales."""
    scales = cache.key_scales
    of_scales = (0, 0) if scales is None else scales.stride()[:2]
    return (*cache.keys.stride()[:3], *of_scales)


def is_far(cache: KVLayer) -> bool:
    """Whether 32 bits do not count the elements from a cache's first to its last."""
    (blocks, tokens, *_), (block_stride, token_stride, *_) = cache.keys.shape, cache.keys.stride()
    return blocks * block_stride + tokens * token_stride >= 1 << 31


def compute_type(queries: torch.dtype, kv: torch.dtype) -> Any:
    """What the matrix units multiply: what queries and cache can both be converted to.

    Eight-bit floats become float16 in one instruction for two of them, and bfloat16 in five.
    """
    if queries == torch.float32 or kv == torch.float32:
        return tl.float32
    if kv == torch.float8_e4m3fn or queries == torch.float16:
        return tl.float16
    return tl.bfloat16
