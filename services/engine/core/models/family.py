"""A model family: the class that computes it, and how its files are read."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from services.engine.core.model_config import ModelConfig
from services.engine.core.models.base import Model
from services.engine.core.models.hf_config import HfConfig, decoder_config
from services.engine.core.weights.names import Names
from services.runtime.modelfiles.gguf_model import GGUFModel


def _as_it_is(config: ModelConfig, file: GGUFModel) -> ModelConfig:
    return config


@dataclass(frozen=True, slots=True)
class Family:
    """One family.

    Attributes:
        model: builds it, weights unset.
        hf_names: what it calls the tensors of a HF checkpoint.
        gguf_names: the same of a GGUF file; None where none is read.
        hf_config: reads its config.json.
        gguf_config: adds to what most GGUF files say.
        gguf_pairs_rows: whether a GGUF file has the rows of queries and keys in pairs.
    """

    model: Callable[[ModelConfig], Model]
    hf_names: Names
    gguf_names: Names | None
    hf_config: Callable[[HfConfig], ModelConfig] = decoder_config
    gguf_config: Callable[[ModelConfig, GGUFModel], ModelConfig] = _as_it_is
    gguf_pairs_rows: bool = False
