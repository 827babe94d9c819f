"""Rotary position embedding of queries and keys."""

from __future__ import annotations

import torch
from torch import Tensor

from services.engine.core.kernels.registry import declare


@declare
def rotary_angles(
    positions: Tensor, frequencies: Tensor, amplitude: float, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Cosines and sines of tokens' angles, times an amplitude, as `rotary_embedding` takes them.

    positions: [num_tokens] int64; frequencies: [rotary_dim / 2] float32. Both results: [num_tokens,
    1, rotary_dim] of `dtype`.
    """
    half = positions.to(torch.float32).view(-1, 1, 1) * frequencies
    cos, sin = half.cos(), half.sin()
    if amplitude != 1.0:
        cos, sin = cos * amplitude, sin * amplitude
    return torch.cat((cos, cos), -1).to(dtype), torch.cat((-sin, sin), -1).to(dtype)


@declare
def rotary_embedding(heads: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate each head's halves against each other (Su et al., arXiv:2104.09864).

    heads: [num_tokens, num_heads, head_dim]; cos, sin: [num_tokens, 1, rotary_dim] for the
    tokens' positions, with the first half of `sin` negated, so that one multiplication serves
    both halves. Dimensions from rotary_dim on pass unrotated. Returns the shape of `heads`.
    """
    rotary_dim = cos.shape[-1]
    if rotary_dim == heads.shape[-1]:
        return torch.addcmul(heads * cos, heads.roll(rotary_dim // 2, -1), sin)
    rotated, rest = heads[..., :rotary_dim], heads[..., rotary_dim:]
    rotated = torch.addcmul(rotated * cos, rotated.roll(rotary_dim // 2, -1), sin)
    return torch.cat((rotated, rest), dim=-1)
