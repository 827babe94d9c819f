"""Projections, by how their weights are stored."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional

from services.engine.core.kernels.registry import declare


@declare
def linear(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """hidden * weight^T + bias, with weights in the precision of the activations.

    hidden: [num_tokens, inputs]; weight: [outputs, inputs]; bias: [outputs]. Returns [num_tokens,
    outputs].
    """
    return functional.linear(hidden, weight, bias)
