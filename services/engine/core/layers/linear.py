"""Linear projections and embeddings, with memory that a loader fills and nothing else does."""

from __future__ import annotations

from collections.abc import Container, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from services.engine.core.kernels import (
    Activations,
    GroupedMatrix,
    Matrix,
    RoundedRows,
    ScaledMatrix,
    grouped_embedding,
    grouped_linear,
    linear,
    scaled_linear,
)
from services.engine.core.kernels.gated_linear import GATES, gated_linear, gated_scaled_linear
from services.engine.core.layers.adapters import LinearAdapters


def project(hidden: Activations, weight: Matrix, bias: Tensor | None) -> Tensor:
    """hidden * weight^T + bias: [num_tokens, inputs] -> [num_tokens, outputs].

    Where a matrix has scales by output, activations are rounded to its format row by row, if they
    do not come so.
    """
    if isinstance(weight, ScaledMatrix):
        rows = RoundedRows.of(hidden, weight.elements.dtype)
        return scaled_linear(rows.elements, rows.scales, weight, bias, rows.dtype)
    assert isinstance(hidden, Tensor), "only what `takes` says is rounded"
    if isinstance(weight, Tensor):
        return linear(hidden, weight, bias)
    return grouped_linear(hidden, weight, bias)


def keep(module: nn.Module, name: str, matrix: GroupedMatrix | ScaledMatrix) -> None:
    """Give a module a matrix of few bits in the place of a parameter."""
    delattr(module, name)
    setattr(module, name, matrix)


class Projection(nn.Module):
    """hidden * weight^T + bias, and what adapters add."""

    weight: Matrix
    adapters: LinearAdapters | None = None

    def __init__(self, in_features: int, out_features: int, *, bias: bool) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(out_features, in_features))
        self.bias = nn.Parameter(torch.empty(out_features)) if bias else None

    @property
    def is_plain(self) -> bool:
        """Whether nothing of the step goes through an adapter here."""
        return self.adapters is None or self.adapters.is_idle

    @property
    def takes(self) -> torch.dtype | None:
        """The format that its input may come rounded to; None: none, as adapters read it too."""
        if isinstance(self.weight, ScaledMatrix) and self.is_plain:
            return self.weight.elements.dtype
        return None

    def projected(self, hidden: Activations) -> Tensor:
        """[num_tokens, in_features] -> [num_tokens, out_features]."""
        projected = project(hidden, self.weight, self.bias)
        if self.adapters is None or self.adapters.is_idle:
            return projected
        assert isinstance(hidden, Tensor), "only what `takes` says is rounded"
        return self.adapters.add(projected, hidden)


class Linear(Projection):
    """A projection [num_tokens, in_features] -> [num_tokens, out_features]."""

    def forward(self, hidden: Activations) -> Tensor:
        return self.projected(hidden)


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


class MergedLinear(Projection):
    """Several projections of the same input, computed as one: their rows lie one after another.

    Checkpoints hold the parts apart, under the names given in `sizes` beside this module, or
    together under its own; `slots` gives the places of whichever are stored.
    """

    def __init__(self, in_features: int, sizes: Mapping[str, int], *, bias: bool) -> None:
        super().__init__(in_features, sum(sizes.values()), bias=bias)
        self.sizes = dict(sizes)

    def forward(
        self, hidden: Activations, *, gate: str = "", to: torch.dtype | None = None
    ) -> Activations:
        """gate: an activation of the first half of the outputs, which multiplies the second; to:
        the format that who reads this `takes`: it may come rounded to that."""
        weight = self.weight
        if not gate:
            return self.projected(hidden)
        if self.is_plain and to is not None and to == self.takes:
            assert isinstance(weight, ScaledMatrix)
            rows = RoundedRows.of(hidden, to)
            elements, scales = gated_scaled_linear(
                rows.elements, rows.scales, weight, self.bias, rows.dtype, gate
            )
            return RoundedRows(elements, scales, rows.dtype)
        if self.is_plain and isinstance(weight, Tensor | GroupedMatrix):
            assert isinstance(hidden, Tensor), "only what `takes` says is rounded"
            return gated_linear(hidden, weight, self.bias, gate)
        return GATES[gate](self.projected(hidden))

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
