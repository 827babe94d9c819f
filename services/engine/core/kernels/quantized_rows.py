"""Activations of eight bits: rows that are rounded, each with a scale of its own, so that a product
of matrices can be one of small numbers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeAlias

import torch
from torch import Tensor

from services.engine.core.kernels.normalization import add_rms_norm
from services.engine.core.kernels.registry import declare

# The largest element that a row is scaled to, by what its elements are kept in.
LARGEST = {torch.int8: 127.0, torch.float8_e4m3fn: torch.finfo(torch.float8_e4m3fn).max}


@declare
def quantize_rows(hidden: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Round each row to `dtype`, int8 or float8_e4m3fn, such that its largest element becomes the
    largest one there (as Dettmers et al., arXiv:2208.07339, do).

    hidden: [num_tokens, size]. Returns the elements, of that shape and contiguous, and the scales,
    [num_tokens] float32: what an element stands for is element * scale. A row of zeros has the
    scale 0.
    """
    rows = hidden.float()
    scales = rows.abs().amax(-1) / LARGEST[dtype]
    scaled = rows / torch.where(scales > 0, scales, 1.0).unsqueeze(-1)
    return (scaled.round() if dtype == torch.int8 else scaled).to(dtype), scales


@declare
def add_rms_norm_quantized(
    hidden: Tensor,
    residual: Tensor,
    weight: Tensor,
    eps: float,
    dtype: torch.dtype,
    before: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """`add_rms_norm` whose first result is rounded as `quantize_rows` does it, to the same bits as
    if it had been stored in the precision of `hidden` in between.

    Returns (elements, scales, sum). Implementations may write the sum into `residual`.
    """
    normed, total = add_rms_norm(hidden, residual, weight, eps, before)
    elements, scales = quantize_rows(normed, dtype)
    return elements, scales, total


@dataclass(frozen=True, slots=True, eq=False)
class RoundedRows:
    """Activations of eight bits on their way from one layer to the next.

    Attributes:
        elements, scales: as `quantize_rows` returns them.
        dtype: what they were rounded from, and what products with them are in.
    """

    elements: Tensor
    scales: Tensor
    dtype: torch.dtype

    @classmethod
    def of(cls, rows: Activations, to: torch.dtype) -> RoundedRows:
        """Rows rounded to a format, if they are not."""
        if isinstance(rows, RoundedRows):
            return rows
        return cls(*quantize_rows(rows, to), rows.dtype)


# What layers hand on: rows as they are, or rounded for a product that takes them so.
Activations: TypeAlias = Tensor | RoundedRows
