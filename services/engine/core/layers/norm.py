"""Norms: RMSNorm, alone and with the residual addition before it, and LayerNorm."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from services.engine.core.kernels import add_rms_norm, layer_norm, rms_norm


class RMSNorm(nn.Module):
    """Normalise [..., size] by its root mean square."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(size))
        self.eps = eps

    def forward(self, hidden: Tensor) -> Tensor:
        return rms_norm(hidden, self.weight, self.eps)

    def add(self, hidden: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
        """Return (norm(hidden + residual), hidden + residual)."""
        return add_rms_norm(hidden, residual, self.weight, self.eps)


class LayerNorm(nn.Module):
    """Normalise [num_tokens, size] to mean 0 and variance 1, then scale and shift it."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(size))
        self.bias = nn.Parameter(torch.empty(size))
        self.eps = eps

    def forward(self, hidden: Tensor) -> Tensor:
        return layer_norm(hidden, self.weight, self.bias, self.eps)
