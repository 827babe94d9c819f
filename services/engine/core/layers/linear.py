"""Linear projections and embeddings, with memory that a loader fills and nothing else does."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor, nn
from torch.nn import functional


class Linear(nn.Module):
    """A projection [num_tokens, in_features] -> [num_tokens, out_features]."""

    def __init__(self, in_features: int, out_features: int, *, bias: bool) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(out_features, in_features))
        self.bias = nn.Parameter(torch.empty(out_features)) if bias else None

    def forward(self, hidden: Tensor) -> Tensor:
        return functional.linear(hidden, self.weight, self.bias)


class Embedding(nn.Module):
    """Token ids [num_tokens] -> [num_tokens, size]; `project` gives logits where a head is tied."""

    def __init__(self, vocab_size: int, size: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(vocab_size, size))

    def forward(self, token_ids: Tensor) -> Tensor:
        return functional.embedding(token_ids, self.weight)

    def project(self, hidden: Tensor) -> Tensor:
        return functional.linear(hidden, self.weight)


class MergedLinear(nn.Module):
    """Several projections of the same input, computed as one: their rows lie one after another.

    Checkpoints hold the parts apart; `parts` gives (name, "weight" or "bias", view) of each, under
    the names given in `sizes`, for a loader to fill.
    """

    def __init__(self, in_features: int, sizes: Mapping[str, int], *, bias: bool) -> None:
        super().__init__()
        self.sizes = dict(sizes)
        self.weight = nn.Parameter(torch.empty(sum(sizes.values()), in_features))
        self.bias = nn.Parameter(torch.empty(sum(sizes.values()))) if bias else None

    def forward(self, hidden: Tensor) -> Tensor:
        return functional.linear(hidden, self.weight, self.bias)

    def parts(self) -> Iterator[tuple[str, str, Tensor]]:
        start = 0
        for name, size in self.sizes.items():
            yield name, "weight", self.weight.data[start : start + size]
            if self.bias is not None:
                yield name, "bias", self.bias.data[start : start + size]
            start += size
