"""What every model family is to the engine."""

from __future__ import annotations

from abc import abstractmethod

from torch import Tensor, nn

from services.engine.core.batch import ForwardBatch
from services.engine.core.kernels.cpu.program import ProgramBuilder
from services.engine.core.kv_cache import KVCache
from services.engine.core.layers import RotaryEmbedding
from services.engine.core.models.config import ModelConfig


class Model(nn.Module):
    """A decoder that computes one engine step: `model(batch, kv_cache)`."""

    rotary: RotaryEmbedding

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config

    def __call__(self, batch: ForwardBatch, kv_cache: KVCache) -> Tensor:
        """Compute a step's tokens, write their keys and values to the cache, and return logits.

        Returns float32 [num_rows, vocab_size], one row per entry of `batch.logits_rows`.
        """
        logits: Tensor = super().__call__(batch, kv_cache)
        return logits

    @abstractmethod
    def forward(self, batch: ForwardBatch, kv_cache: KVCache) -> Tensor:
        """Implement `__call__`."""

    def lower(self, program: ProgramBuilder) -> None:
        """Append this model's step to a program of the native CPU kernels.

        Raises NotImplementedError for a family that has none: it runs on plain torch.
        """
        raise NotImplementedError(f"{type(self).__name__} has no native program")
