"""Projections, by how their weights are stored."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from services.engine.core.kernels.matrices import GroupedMatrix, ScaledMatrix
from services.engine.core.kernels.registry import declare


@declare
def linear(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """hidden * weight^T + bias, with weights in the precision of the activations.

    hidden: [num_tokens, inputs]; weight: [outputs, inputs]; bias: [outputs]. Returns [num_tokens,
    outputs].
    """
    return functional.linear(hidden, weight, bias)


@declare
def grouped_linear(hidden: Tensor, weight: GroupedMatrix, bias: Tensor | None) -> Tensor:
    """hidden * weight^T + bias, with weights of eight or four bits in groups, and activations as
    they are (weight-only quantisation; Frantar et al., arXiv:2210.17323).

    hidden: [num_tokens, inputs]; weight: [outputs, inputs]; bias: [outputs]. Returns [num_tokens,
    outputs]. Weights are rounded to the precision of the activations, sums are not.
    """
    return functional.linear(hidden, weight.dequantize().to(hidden.dtype), bias)


@declare
def scaled_linear(
    elements: Tensor,
    scales: Tensor,
    weight: ScaledMatrix,
    bias: Tensor | None,
    dtype: torch.dtype,
) -> Tensor:
    """hidden * weight^T + bias, with activations and weights of eight bits, the same kind: int8,
    whose sums are exact, or float8_e4m3fn (Dettmers et al., arXiv:2208.07339; Micikevicius et al.,
    arXiv:2209.05433).

    elements: [num_tokens, inputs], scales: [num_tokens], as `quantize_rows` returns them; weight:
    [outputs, inputs]; bias: [outputs]. Returns [num_tokens, outputs] of `dtype`.
    """
    # In float64 sums of products of bytes are exact, and the device that has int8 has that.
    products = elements.double() @ weight.elements.double().T
    projected = products.float() * scales[:, None] * weight.scales
    if bias is not None:
        projected = projected + bias.float()
    return projected.to(dtype)


@declare
def grouped_embedding(token_ids: Tensor, weight: GroupedMatrix, dtype: torch.dtype) -> Tensor:
    """Look up rows of a matrix that is stored in groups: [num_tokens] -> [num_tokens, inputs] of
    `dtype`.
    """
    return weight.rows(token_ids).dequantize().to(dtype)
