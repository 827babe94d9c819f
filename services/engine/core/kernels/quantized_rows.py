"""Activations of eight bits: rows that are rounded, each with a scale of its own, so that a product
of matrices can be one of small numbers."""

from __future__ import annotations

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
    hidden: Tensor, residual: Tensor, weight: Tensor, eps: float, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    """Add `hidden` to the residual stream, normalise the sum and round it.

    hidden, residual: [num_tokens, size], weight: [size] -> (elements and scales as `quantize_rows`
    returns them, sum). Implementations may write the sum into `residual`.
    """
    normed, total = add_rms_norm(hidden, residual, weight, eps)
    elements, scales = quantize_rows(normed, dtype)
    return elements, scales, total
