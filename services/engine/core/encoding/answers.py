"""From token vectors to what was asked for of each sequence."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from torch.nn import functional

from services.engine.core.encoding.heads import ClassificationHead
from services.engine.core.encoding.layers import ACTIVATIONS
from services.engine.core.encoding.outputs import Activation, DenseConfig, OutputConfig
from services.engine.core.encoding.pooling import Pooling, pool
from services.engine.core.layers import Linear
from services.engine.core.messages import EncodeTask
from services.engine.core.weights.checkpoint import SafetensorsCheckpoint
from services.engine.core.weights.loading import check_weights, load_weights
from services.engine.core.weights.names import Names

_DENSE_NAMES = Names(
    lambda source: source if source.startswith("linear.") else None, lambda source: False
)


class Dense(nn.Module):
    """A dense layer of sentence-transformers, after the pooling."""

    def __init__(self, config: DenseConfig) -> None:
        super().__init__()
        self.linear = Linear(config.inputs, config.outputs, bias=config.bias)
        self.activation = config.activation

    def forward(self, pooled: Tensor) -> Tensor:
        return ACTIVATIONS[self.activation](self.linear(pooled))


def load_dense(config: DenseConfig, device: torch.device | str = "cpu") -> Dense:
    """Load one in float32. Raises ModelFileError where its file does not fit."""
    checkpoint = SafetensorsCheckpoint(config.path, _DENSE_NAMES)
    with torch.device("meta"):
        check_weights(Dense(config), checkpoint, tied=False)
    with torch.device(device):
        dense = Dense(config)
    load_weights(dense, checkpoint)
    return dense.eval().requires_grad_(False)


class Answers:
    """Makes the answer of each sequence of a batch: a vector, or the scores of the classes."""

    def __init__(
        self,
        outputs: OutputConfig,
        hidden_size: int,
        head: ClassificationHead | None = None,
        dense: Sequence[Dense] = (),
    ) -> None:
        self.head = head
        self._outputs = outputs
        self._dense = tuple(dense)
        pooled_size = hidden_size * len(outputs.poolings)
        self.embedding_size = outputs.dense[-1].outputs if outputs.dense else pooled_size

    @torch.inference_mode()
    def make(
        self, hidden: Tensor, lengths: Sequence[int], tasks: Sequence[EncodeTask]
    ) -> list[npt.NDArray[np.float32]]:
        """One answer for each sequence.

        hidden: float32 [num_tokens, hidden_size], flattened over sequences of `lengths`; `tasks`
        says of each what is wanted.
        """
        answers: list[npt.NDArray[np.float32]] = [_NOTHING] * len(tasks)
        # Nearly always they all want the same.
        for task in set(tasks):
            rows = self._make(hidden, lengths, task).cpu().numpy()
            for index, own in enumerate(tasks):
                if own == task:
                    answers[index] = rows[index]
        return answers

    def _make(self, hidden: Tensor, lengths: Sequence[int], task: EncodeTask) -> Tensor:
        if task.kind == "embed":
            return self._embed(hidden, lengths, task)
        assert self.head is not None  # the front asks no other model
        logits = self.head(pool(hidden, lengths, self.head.pooling))
        outputs = self._outputs
        is_score = task.kind == "score"
        return _activate(logits, outputs.score_activation if is_score else outputs.class_activation)

    def _embed(self, hidden: Tensor, lengths: Sequence[int], task: EncodeTask) -> Tensor:
        poolings: tuple[Pooling, ...] = self._outputs.poolings
        if task.pooling is not None:
            # A dense layer takes as much as the model's own poolings make.
            poolings = (task.pooling,) * len(poolings)
        pooled = torch.cat([pool(hidden, lengths, pooling) for pooling in poolings], dim=-1)
        for dense in self._dense:
            pooled = dense(pooled)
        if task.dimensions is not None:
            pooled = pooled[:, : task.dimensions]
        normalize = self._outputs.normalize if task.normalize is None else task.normalize
        return functional.normalize(pooled, dim=-1) if normalize else pooled


def _activate(logits: Tensor, activation: Activation) -> Tensor:
    if activation == "sigmoid":
        return logits.sigmoid()
    return logits.softmax(-1) if activation == "softmax" else logits


_NOTHING = np.empty(0, np.float32)
