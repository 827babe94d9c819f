"""Rotary position embedding of queries and keys."""

from __future__ import annotations

import torch
from torch import Tensor

from services.engine.core.kernels.registry import declare


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
