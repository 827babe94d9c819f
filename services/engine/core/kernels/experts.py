"""Mixtures of experts: each token goes through a few of many feed-forward layers."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from services.engine.core.kernels.activation import silu_and_mul
from services.engine.core.kernels.matrices import GroupedMatrix
from services.engine.core.kernels.registry import declare


@declare
def choose_experts(logits: Tensor, per_token: int, normalize: bool) -> tuple[Tensor, Tensor]:
    """The experts of each token, those of its largest logits, and their shares: the softmax over
    all, or, normalised, over the chosen ones.

    logits: [num_tokens, experts]. Returns int64 and the type of the logits, both [num_tokens,
    per_token], the largest share first.
    """
    shares = logits.softmax(-1, dtype=torch.float32)
    weights, ids = shares.topk(per_token, dim=-1)
    if normalize:
        weights = weights / weights.sum(-1, keepdim=True)
    return ids, weights.to(logits.dtype)


@declare
def mixture_of_experts(
    hidden: Tensor, gate_up: Tensor, down: Tensor, expert_ids: Tensor, expert_weights: Tensor
) -> Tensor:
    """The weighted sum of what a token's experts make of it, SwiGLU layers (Shazeer et al.,
    arXiv:1701.06538; Jiang et al., arXiv:2401.04088).

    hidden: [num_tokens, size]; gate_up: [experts, 2 * intermediate, size]; down: [experts, size,
    intermediate]; expert_ids (int64), expert_weights: [num_tokens, experts of a token]. Returns
    [num_tokens, size].
    """
    output = torch.zeros_like(hidden)
    for expert in sorted(set(expert_ids.flatten().tolist())):
        rows, places = torch.where(expert_ids == expert)
        inner = silu_and_mul(functional.linear(hidden[rows], gate_up[expert]))
        outer = functional.linear(inner, down[expert])
        output.index_add_(0, rows, outer * expert_weights[rows, places, None])
    return output


@declare
def grouped_mixture_of_experts(
    hidden: Tensor,
    gate_up: Tensor | GroupedMatrix,
    down: Tensor | GroupedMatrix,
    expert_ids: Tensor,
    expert_weights: Tensor,
) -> Tensor:
    """`mixture_of_experts` with matrices of eight and four bits in groups, both or either of the
    stacks."""
    output = torch.zeros_like(hidden)
    for expert in sorted(set(expert_ids.flatten().tolist())):
        rows, places = torch.where(expert_ids == expert)
        inner = silu_and_mul(functional.linear(hidden[rows], _of(gate_up, expert, hidden.dtype)))
        outer = functional.linear(inner, _of(down, expert, hidden.dtype))
        output.index_add_(0, rows, outer * expert_weights[rows, places, None])
    return output


def _of(stack: Tensor | GroupedMatrix, expert: int, dtype: torch.dtype) -> Tensor:
    if isinstance(stack, Tensor):
        return stack[expert]
    return stack.rows(expert).dequantize().to(dtype)
