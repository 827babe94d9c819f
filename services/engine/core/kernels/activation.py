"""Gated activations of feed-forward layers."""

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
