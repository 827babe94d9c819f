"""Root-mean-square normalisation, alone and fused with the residual addition before it."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional

from services.engine.core.kernels.registry import declare


@declare
def rms_norm(hidden: Tensor, weight: Tensor, eps: float) -> Tensor:
    """RMSNorm (Zhang and Sennrich, arXiv:1910.07467), computed in float32 at least.

    hidden: [num_tokens, size], weight: [size] -> [num_tokens, size].
    """
    return functional.rms_norm(hidden, (hidden.shape[-1],), weight, eps)


@declare
def add_rms_norm(
    hidden: Tensor, residual: Tensor, weight: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    """Add `hidden` to the residual stream and normalise the sum.

    hidden, residual: [num_tokens, size], weight: [size] -> (normalised, sum), both of that shape.
    Implementations may write the sum into `residual`.
    """
    total = residual + hidden
    return functional.rms_norm(total, (total.shape[-1],), weight, eps), total


@declare
def layer_norm(hidden: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    """LayerNorm (Ba et al., arXiv:1607.06450), computed in float32 at least.

    hidden: [num_tokens, size], weight and bias: [size] -> [num_tokens, size].
    """
    return functional.layer_norm(hidden, (hidden.shape[-1],), weight, bias, eps)
