"""Projections whose first half of outputs gates the second: the way into SwiGLU and GeGLU."""

from __future__ import annotations

import torch
from torch import Tensor

from services.engine.core.kernels.activation import gelu_tanh_and_mul, silu_and_mul
from services.engine.core.kernels.linear import grouped_linear, linear, scaled_linear
from services.engine.core.kernels.matrices import GroupedMatrix, ScaledMatrix
from services.engine.core.kernels.quantized_rows import quantize_rows
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


@declare
def gated_scaled_linear(
    elements: Tensor,
    scales: Tensor,
    weight: ScaledMatrix,
    bias: Tensor | None,
    dtype: torch.dtype,
    activation: str,
) -> tuple[Tensor, Tensor]:
    """The same of rows and weights of eight bits, as `scaled_linear` takes them, whose result is
    rounded to their format again.

    Returns elements, [num_tokens, intermediate], and scales, as `quantize_rows` does.
    """
    gated = GATES[activation](scaled_linear(elements, scales, weight, bias, dtype))
    return quantize_rows(gated, elements.dtype)
