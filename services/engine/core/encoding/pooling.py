"""How the vectors of a sequence's tokens become one."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, TypeAlias, get_args

import torch
from torch import Tensor

Pooling: TypeAlias = Literal["mean", "first", "last", "max", "mean_sqrt_len", "weighted_mean"]
POOLINGS: tuple[Pooling, ...] = get_args(Pooling)


def pool(hidden: Tensor, lengths: Sequence[int], pooling: Pooling) -> Tensor:
    """One vector for each sequence.

    hidden: [num_tokens, size], flattened over sequences of `lengths` -> [num_sequences, size].
    "mean_sqrt_len" divides the sum by the root of the length; "weighted_mean" gives the token at
    position i the weight i + 1 (Muennighoff, arXiv:2202.08904).
    """
    counts = torch.tensor(lengths, device=hidden.device)
    ends = counts.cumsum(0)
    if pooling == "first":
        return hidden.index_select(0, ends - counts)
    if pooling == "last":
        return hidden.index_select(0, ends - 1)
    sequence = torch.arange(len(lengths), device=hidden.device).repeat_interleave(counts)
    if pooling == "max":
        least = hidden.new_full((len(lengths), hidden.shape[1]), float("-inf"))
        return least.scatter_reduce_(0, sequence.unsqueeze(1).expand_as(hidden), hidden, "amax")
    divisor = counts.to(hidden.dtype)
    if pooling == "mean_sqrt_len":
        divisor = divisor.sqrt()
    elif pooling == "weighted_mean":
        first = (ends - counts).repeat_interleave(counts)
        weights = torch.arange(1, len(hidden) + 1, device=hidden.device) - first
        hidden = hidden * weights.unsqueeze(1)
        divisor = divisor * (divisor + 1) / 2
    sums = hidden.new_zeros(len(lengths), hidden.shape[1]).index_add_(0, sequence, hidden)
    return sums / divisor.unsqueeze(1)
