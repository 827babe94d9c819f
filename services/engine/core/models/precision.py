"""In what precision each matrix of a model is kept, whatever computes with it.

A router stays in floats: it is small, and an error in it sends tokens elsewhere. A head has eight
bits at least: logits show every error in it. A quantised model's head has eight at most: every step
reads all of it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor

from services.engine.core.kernels.cpu.packing import GroupedWeight, concatenate, quantize_4
from services.engine.core.layers import Embedding, ExpertMatrices, MergedLinear
from services.engine.core.models.base import Model
from services.engine.core.weights.checkpoint import Checkpoint
from services.engine.core.weights.stored_linear import rounded

# "auto": quantised matrices in their own precision, or in 8 bits where they cannot be, a quantised
# model's head in 8 bits at most, all others as floats.
WeightChoice: TypeAlias = Literal["auto", "bfloat16", "int8", "int4"]


class MatrixReader:
    """Reads a model's matrices from its checkpoint, each as it is to be kept."""

    def __init__(self, model: Model, checkpoint: Checkpoint, weights: WeightChoice) -> None:
        self._checkpoint = checkpoint
        self._weights = weights
        # Matrices by what they are stored as, of those that `auto` rounds to 8 bits.
        self.rounded: Counter[str] = Counter()
        self._logits = "embedding" if model.config.tie_embeddings else "head"
        self._paths = {id(module): path for path, module in model.named_modules()}

    def choose(self, module: Any) -> GroupedWeight | Tensor:
        """Return a module's matrix as it is to be kept."""
        names = self._names(module)
        if self.is_router(module):
            return self._floats(names)
        grouped = self._grouped(names, is_head=self.is_head(module))
        return self._floats(names) if grouped is None else grouped

    def choose_each(self, matrices: ExpertMatrices) -> Iterator[GroupedWeight | Tensor]:
        """Return the matrix of one expert after the other as it is to be kept."""
        path, count = self._paths[id(matrices.experts)], matrices.experts.count
        if f"{path}.{matrices.parts[0]}.weight" not in self._checkpoint.shapes:
            for index in range(count):
                names = [f"{path}.{index}.{part}" for part in matrices.parts]
                grouped = self._grouped(names, is_head=False)
                yield self._floats(names) if grouped is None else grouped
            return
        # The experts' matrices of a part are stored as one stack.
        names = [f"{path}.{part}" for part in matrices.parts]
        stacks = [None if self._weights == "bfloat16" else self._read_grouped(n) for n in names]
        floats: list[Tensor] = []  # read where something is to be rounded
        for index in range(count):

            def values(index: int = index) -> Tensor:
                if not floats:
                    floats.extend(self.read_floats(f"{name}.weight") for name in names)
                parts = [part[index] for part in floats]
                return parts[0] if len(parts) == 1 else torch.cat(parts)

            parts = [_of_expert(stack, index, count) for stack in stacks]
            grouped = self._kept(parts, values, is_head=False)
            yield values() if grouped is None else grouped

    def is_router(self, module: Any) -> bool:
        """Whether a module chooses experts."""
        path: str = self._paths[id(module)]
        return path.endswith(".router")

    def is_head(self, module: Any) -> bool:
        """Whether a module computes logits, or may."""
        return isinstance(module, Embedding) or self._paths[id(module)] == "head"

    def read_floats(self, name: str) -> Tensor:
        """Read a tensor that is to be kept, or to be rounded."""
        return self._checkpoint.read(name)

    def round(self, floats: Tensor) -> GroupedWeight:
        """Return a matrix of floats rounded to 8 bits."""
        return rounded(lambda rows: floats[rows], (floats.shape[0], floats.shape[1]))

    def round_to_4(self, floats: Tensor) -> GroupedWeight:
        """Return a matrix of floats rounded to 4 bits."""
        return quantize_4(floats)

    def _names(self, module: Any) -> list[str]:
        path = self._paths[id(module)]
        if isinstance(module, MergedLinear) and f"{path}.weight" not in self._checkpoint.shapes:
            parent = path.rpartition(".")[0]
            return [f"{parent}.{part}" for part in module.sizes]
        return [path]

    def _floats(self, names: list[str]) -> Tensor:
        parts = [self.read_floats(f"{name}.weight") for name in names]
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def _grouped(self, names: list[str], *, is_head: bool) -> GroupedWeight | None:
        if self._weights == "bfloat16":
            return None
        parts = [self._read_grouped(name) for name in names]
        return self._kept(parts, lambda: self._floats(names), is_head=is_head)

    def _kept(
        self,
        parts: list[GroupedWeight | None],
        floats: Callable[[], Tensor],
        *,
        is_head: bool,
    ) -> GroupedWeight | None:
        stored = [part for part in parts if part is not None]
        own = concatenate(stored) if len(stored) == len(parts) else None
        if self._weights in ("auto", "bfloat16"):
            return own
        if self._weights == "int4" and not is_head:
            return own if own is not None and own.bits == 4 else self.round_to_4(floats())
        if own is not None and own.minima is None:
            return own
        return self.round(floats())

    def _read_grouped(self, name: str) -> GroupedWeight | None:
        weight = self._checkpoint.read_grouped(f"{name}.weight")
        if weight is None and name == self._logits and self._checkpoint.is_quantised:
            weight = self.round(self.read_floats(f"{name}.weight"))
        if weight is not None and weight.is_rounded:
            self.rounded[self._checkpoint.stored_as(f"{name}.weight")] += 1
        return weight


def _of_expert(stack: GroupedWeight | None, index: int, count: int) -> GroupedWeight | None:
    """One of `count` matrices that lie one after the other."""
    if stack is None:
        return None
    each = stack.shape[0] // count
    return stack.map(lambda rows: rows[index * each : (index + 1) * each])
