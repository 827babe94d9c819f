"""What becomes of the vector of a sequence: the scores of classes."""

from __future__ import annotations

from torch import Tensor, nn

from services.engine.core.encoding.layers import ACTIVATIONS, LayerNorm
from services.engine.core.encoding.pooling import Pooling
from services.engine.core.layers import Linear


class ClassificationHead(nn.Module):
    """A dense layer over a pooled vector, and the logits of the classes."""

    def __init__(
        self,
        size: int,
        num_labels: int,
        *,
        pooling: Pooling = "first",
        activation: str,
        dense_bias: bool = True,
        norm: LayerNorm | None = None,
    ) -> None:
        super().__init__()
        self.pooling: Pooling = pooling
        self.dense = Linear(size, size, bias=dense_bias)
        self.activation = activation
        self.norm = norm
        self.output = Linear(size, num_labels, bias=True)

    def forward(self, pooled: Tensor) -> Tensor:
        """[num_sequences, size] -> [num_sequences, num_labels]"""
        hidden = ACTIVATIONS[self.activation](self.dense(pooled))
        if self.norm is not None:
            hidden = self.norm(hidden)
        logits: Tensor = self.output(hidden)
        return logits
