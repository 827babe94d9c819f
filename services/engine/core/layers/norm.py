"""Norms: RMSNorm, alone and with the residual addition before it, and LayerNorm."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from services.engine.core.kernels import (
    Activations,
    RoundedRows,
    add_rms_norm,
    add_rms_norm_quantized,
    layer_norm,
    rms_norm,
    rms_norm_of_rows,
)


class RMSNorm(nn.Module):
    """Normalise [..., size] by its root mean square.

    to: the format that who reads the result `takes`, if it is to be rounded for it.
    """

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(size))
        self.eps = eps

    def forward(self, hidden: Tensor, to: torch.dtype | None = None) -> Activations:
        normed = rms_norm(hidden, self.weight, self.eps)
        return normed if to is None else RoundedRows.of(normed, to)

    def add(
        self,
        hidden: Tensor,
        residual: Tensor,
        to: torch.dtype | None = None,
        *,
        before: RMSNorm | None = None,
    ) -> tuple[Activations, Tensor]:
        """Return (norm(sum), sum), where sum is hidden + residual, or before(hidden) + residual.

        before: a norm with the same eps.
        """
        own = None if before is None else before.weight
        if to is None:
            return add_rms_norm(hidden, residual, self.weight, self.eps, own)
        elements, scales, total = add_rms_norm_quantized(
            hidden, residual, self.weight, self.eps, to, own
        )
        return RoundedRows(elements, scales, hidden.dtype), total

    def of_rows(
        self,
        hidden: Tensor,
        rows: Tensor,
        added: Tensor | None = None,
        *,
        before: RMSNorm | None = None,
    ) -> Tensor:
        """The norm of some rows, [num_rows] int64, of what `add` calls the sum."""
        own = None if before is None else before.weight
        return rms_norm_of_rows(hidden, rows, self.weight, self.eps, added, own)


class LayerNorm(nn.Module):
    """Normalise [num_tokens, size] to mean 0 and variance 1, then scale and shift it."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(size))
        self.bias = nn.Parameter(torch.empty(size))
        self.eps = eps

    def forward(self, hidden: Tensor) -> Tensor:
        return layer_norm(hidden, self.weight, self.bias, self.eps)

    def of_rows(self, hidden: Tensor, rows: Tensor) -> Tensor:
        """The norm of some rows, [num_rows] int64."""
        return self(hidden.index_select(0, rows))  # type: ignore[no-any-return]
