"""Projections whose first half of outputs gates the second: the way into SwiGLU and GeGLU."""

from __future__ import annotations

from torch import Tensor

from services.engine.core.kernels.activation import gelu_tanh_and_mul, silu_and_mul
from services.engine.core.kernels.linear import grouped_linear, linear
from services.engine.core.kernels.matrices import GroupedMatrix
from services.engine.core.kernels.registry import declare

# By the names of activations in models' configurations.
GATES = {"silu": silu_and_mul, "gelu_tanh": gelu_tanh_and_mul}


@declare
def gated_linear(
    hidden: Tensor, weight: Tensor | GroupedMatrix, bias: Tensor | None, activation: str
) -> Tensor:
    """activation(gate) * up, where gate and up are the halves of hidden * weight^T + bias (Shazeer,
    arXiv:2002.05202).

    hidden: [num_tokens, inputs]; weight: [2 * intermediate, inputs], rows of gate before those of
    up; bias: [2 * intermediate]; activation: a name of GATES. Returns [num_tokens, intermediate].
    Gate and up need not be rounded on the way.
    """
    if isinstance(weight, Tensor):
        projected = linear(hidden, weight, bias)
    else:
        projected = grouped_linear(hidden, weight, bias)
    return GATES[activation](projected)
