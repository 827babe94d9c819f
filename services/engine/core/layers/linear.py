"""Linear projections and embeddings, with memory that a loader fills and nothing else does."""

from __future__ import annotations

from collections.abc import Container, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from services.engine.core.kernels import (
    GroupedMatrix,
    Matrix,
    ScaledMatrix,
    grouped_embedding,
    grouped_linear,
    linear,
    quantize_rows,
    scaled_linear,
)
from services.engine.core.kernels.gated_linear import GATES, gated_linear
from services.engine.core.layers.adapters import LinearAdapters


def project(hidden: Tensor, weight: Matrix, bias: Tensor | None) -> Tensor:
    """hidden * weight^T + bias: [num_tokens, inputs] -> [num_tokens, outputs].

    Where a matrix has scales by output, activations are rounded to its format row by row.
    """
    if isinstance(weight, Tensor):
        return linear(hidden, weight, bias)
    if isinstance(weight, GroupedMatrix):
        return grouped_linear(hidden, weight, bias)
    elements, scales = quantize_rows(hidden, weight.elements.dtype)
    return scaled_linear(elements, scales, weight, bias, hidden.dtype)


def keep(module: nn.Module, name: str, matrix: GroupedMatrix | ScaledMatrix) -> None:
    """Give a module a matrix of few bits in the place of a parameter."""
    delattr(module, name)
    setattr(module, name, matrix)


class Linear(nn.Module):
    """A projection [num_tokens, in_features] -> [num_tokens, out_features]."""

    weight: Matrix
    adapters: LinearAdapters | None = None

    def __init__(self, in_features: int, out_features: int, *, bias: bool) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(out_features, in_features))
        self.bias = nn.Parameter(torch.empty(out_features)) if bias else None

    def forward(self, hidden: Tensor) -> Tensor:
        projected = project(hidden, self.weight, self.bias)
        return projected if self.adapters is None else self.adapters.add(projected, hidden)


class Embedding(nn.Module):
    """Token ids [num_tokens] -> [num_tokens, size]; `project` gives logits where a head is tied.

    weight: a parameter, or a GroupedMatrix; then `dtype` is what embeddings are looked up in.
    """

    weight: Any
    dtype: torch.dtype | None = None

    def __init__(self, vocab_size: int, size: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(vocab_size, size))

    def forward(self, token_ids: Tensor) -> Tensor:
        if self.dtype is not None:
            return grouped_embedding(token_ids, self.weight, self.dtype)
        return functional.embedding(token_ids, self.weight)

    def project(self, hidden: Tensor) -> Tensor:
        return project(hidden, self.weight, None)


class MergedLinear(nn.Module):
    """Several projections of the same input, computed as one: their rows lie one after another.

    Checkpoints hold the parts apart, under the names given in `sizes` beside this module, or
    together under its own; `slots` gives the places of whichever are stored.
    """

    weight: Matrix
    adapters: LinearAdapters | None = None

    def __init__(self, in_features: int, sizes: Mapping[str, int], *, bias: bool) -> None:
        super().__init__()
        self.sizes = dict(sizes)
        self.weight = nn.Parameter(torch.empty(sum(sizes.values()), in_features))
        self.bias = nn.Parameter(torch.empty(sum(sizes.values()))) if bias else None

    def forward(self, hidden: Tensor, *, gate: str = "") -> Tensor:
        """gate: an activation of the first half of the outputs, which multiplies the second."""
        if gate and self.adapters is None and isinstance(self.weight, Tensor | GroupedMatrix):
            return gated_linear(hidden, self.weight, self.bias, gate)
        projected = project(hidden, self.weight, self.bias)
        if self.adapters is not None:
            projected = self.adapters.add(projected, hidden)
        return GATES[gate](projected) if gate else projected

    def slots(self, path: str, stored: Container[str]) -> dict[str, Tensor]:
        """Where each stored tensor goes: views into the parameters."""
        kinds = {kind: parameter.data for kind, parameter in self.named_parameters(recurse=False)}
        if f"{path}.weight" in stored:
            return {f"{path}.{kind}": whole for kind, whole in kinds.items()}
        slots, start, parent = {}, 0, path.rpartition(".")[0]
        for name, size in self.sizes.items():
            for kind, whole in kinds.items():
                slots[f"{parent}.{name}.{kind}"] = whole[start : start + size]
            start += size
        return slots
