"""What every family of encoders is to the engine."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Protocol

import torch
from torch import Tensor, nn

from services.engine.core.encoding.batch import EncoderBatch
from services.engine.core.encoding.config import EncoderConfig
from services.engine.core.encoding.heads import ClassificationHead
from services.engine.core.encoding.outputs import OutputConfig
from services.engine.core.kernels.cpu.encoder_program import EncoderProgramBuilder
from services.engine.core.kernels.cpu.program import UnsupportedModelError
from services.engine.core.kernels.cpu.team import Team
from services.engine.core.models.precision import WeightChoice
from services.engine.core.weights.checkpoint import Checkpoint
from services.runtime.modelfiles.fields import Fields


@dataclass(frozen=True, slots=True)
class EncoderShape:
    """What the engine says of a model."""

    architecture: str
    num_layers: int
    hidden_size: int
    vocab_size: int
    max_tokens: int  # of a sequence
    labels: tuple[str, ...] = ()


class OpenedModel(Protocol):
    """A model that was found fit for its architecture, and no memory taken for it yet."""

    @property
    def shape(self) -> EncoderShape:
        """What the engine says of it."""

    @property
    def skeleton(self) -> nn.Module:
        """Its parameters, without memory."""

    @property
    def checkpoint(self) -> Checkpoint:
        """Where they are read from."""

    @property
    def outputs(self) -> OutputConfig:
        """What becomes of its vectors."""

    def load(self, dtype: torch.dtype, device: torch.device, *, batch_tokens: int) -> Encodes:
        """Load it for plain torch; a batch has at most `batch_tokens`, or one sequence.

        Raises ModelFileError for a tensor that cannot be read and torch.OutOfMemoryError where the
        device has not the room.
        """

    def load_natively(
        self, team: Team, weights: WeightChoice, *, batch_tokens: int
    ) -> tuple[Encodes, dict[str, int]]:
        """Load it for the native kernels; returns the bytes of its matrices by format as well.

        Raises UnsupportedModelError where the kernels do not serve it, and MemoryError.
        """

    def load_head(self, device: torch.device) -> ClassificationHead | None:
        """Load its classification head alone, in float32; None where it has none."""


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

        Raises UnsupportedModelError for a family that has no program and runs on plain torch, and
        ValueError for a shape that they do not serve.
        """
        raise UnsupportedModelError(f"{type(self).__name__} has no native program")

    def forward(self, batch: EncoderBatch) -> Tensor:
        """The vectors of all tokens, float32 [num_tokens, hidden_size]."""
        return self.encode(batch).float()
