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
    hidden: Tensor, residual: Tensor, weight: Tensor, eps: float, before: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Add `hidden` to the residual stream and normalise the sum.

    hidden, residual: [num_tokens, size], weight: [size] -> (normalised, sum), both of that shape.
    before: [size], the weight of an RMSNorm with the same `eps` that `hidden` goes through first.
    Implementations may write the sum into `residual`.
    """
    if before is not None:
        hidden = functional.rms_norm(hidden, (hidden.shape[-1],), before, eps)
    total = residual + hidden
    return functional.rms_norm(total, (total.shape[-1],), weight, eps), total


@declare
def rms_norm_of_rows(
    hidden: Tensor,
    rows: Tensor,
    weight: Tensor,
    eps: float,
    added: Tensor | None = None,
    before: Tensor | None = None,
) -> Tensor:
    """RMSNorm of some rows of the residual stream: those whose logits are wanted.

    hidden: [num_tokens, size]; rows: [num_rows] int64; added, before: what is added to the stream
    first, and the norm that it goes through, as `add_rms_norm` has them. Returns [num_rows, size].
    """
    chosen = hidden.index_select(0, rows)
    if added is None:
        return rms_norm(chosen, weight, eps)
    return add_rms_norm(added.index_select(0, rows), chosen, weight, eps, before)[0]


@declare
def layer_norm(hidden: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    """LayerNorm (Ba et al., arXiv:1607.06450), computed in float32 at least.

    hidden: [num_tokens, size], weight and bias: [size] -> [num_tokens, size].
    """
    return functional.layer_norm(hidden, (hidden.shape[-1],), weight, bias, eps)
