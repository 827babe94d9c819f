"""What every family of encoders is to the engine."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from typing import ClassVar, Protocol

from torch import Tensor, nn

from services.engine.core.encoding.batch import EncoderBatch
from services.engine.core.encoding.config import EncoderConfig
from services.engine.core.encoding.heads import ClassificationHead
from services.engine.core.kernels.cpu.encoder_program import EncoderProgramBuilder
from services.runtime.modelfiles.fields import Fields


class Encodes(Protocol):
    """Anything that computes token vectors."""

    def __call__(self, batch: EncoderBatch) -> Tensor:
        """The vectors of all tokens, float32 [num_tokens, hidden_size]."""


class Encoder(nn.Module):
    """An encoder on plain torch: `model(batch)`, and its classification head if it has one.

    `NAMES` maps HF's modules to its own, `PREFIX` is what checkpoints with a head put before those
    of the encoder, and `HEAD_NAMES` maps those of the head; {} stands for the layer number.
    """

    PREFIX: ClassVar[str]
    NAMES: ClassVar[Mapping[str, str]]
    HEAD_NAMES: ClassVar[Mapping[str, str]]

    def __init__(self, config: EncoderConfig) -> None:
        super().__init__()
        self.config = config
        self.head: ClassificationHead | None = None

    @classmethod
    @abstractmethod
    def read_config(cls, fields: Fields) -> EncoderConfig:
        """The family's shape from a config.json. Raises ModelFileError."""

    @abstractmethod
    def encode(self, batch: EncoderBatch) -> Tensor:
        """The vectors of all tokens in the model's dtype, [num_tokens, hidden_size]."""

    def lower(self, program: EncoderProgramBuilder) -> None:
        """Append this encoder to a program of the native CPU kernels.

        Raises NotImplementedError for a family that has none: it runs on plain torch.
        """
        raise NotImplementedError(f"{type(self).__name__} has no native program")

    def forward(self, batch: EncoderBatch) -> Tensor:
        """The vectors of all tokens, float32 [num_tokens, hidden_size]."""
        return self.encode(batch).float()
