"""Activations of feed-forward layers."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional

from services.engine.core.kernels.registry import declare


@declare
def silu_and_mul(gate_up: Tensor) -> Tensor:
    """SwiGLU's gate: silu(gate) * up, with gate and up side by side (Shazeer, arXiv:2002.05202).

    gate_up: [num_tokens, 2 * intermediate] -> [num_tokens, intermediate].
    """
    gate, up = gate_up.chunk(2, dim=-1)
    return functional.silu(gate).mul_(up)


@declare
def gelu_tanh_and_mul(gate_up: Tensor) -> Tensor:
    """GeGLU's gate: gelu(gate) * up, in the form of GELU that uses tanh (same paper).

    gate_up: [num_tokens, 2 * intermediate] -> [num_tokens, intermediate].
    """
    gate, up = gate_up.chunk(2, dim=-1)
    return functional.gelu(gate, approximate="tanh").mul_(up)


@declare
def gelu_tanh(hidden: Tensor) -> Tensor:
    """GELU (Hendrycks and Gimpel, arXiv:1606.08415) in the form that uses tanh.

    hidden: [num_tokens, intermediate] -> the same shape.
    """
    return functional.gelu(hidden, approximate="tanh")
