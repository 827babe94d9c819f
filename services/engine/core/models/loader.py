"""From a path to a model that can run a step."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import torch

from services.engine.core.models.base import Model
from services.engine.core.models.config import ModelConfig, config_from_gguf, config_from_hf
from services.engine.core.models.registry import ARCHITECTURES
from services.engine.core.weights.checkpoint import Checkpoint
from services.engine.core.weights.loading import check_weights, load_weights
from services.engine.core.weights.opening import open_checkpoint
from services.runtime.modelfiles import ModelFileError
from services.runtime.modelfiles.gguf_model import GGUFModel


def read_config(path: Path | str) -> ModelConfig:
    """Return the shape of the model at `path`, a HF directory or a .gguf file.

    Raises ModelFileError for a file that is missing, damaged or of an unknown architecture.
    """
    path = Path(path)
    if path.is_dir():
        config = config_from_hf(path)
    else:
        with GGUFModel(path) as file:
            config = config_from_gguf(file)
    if config.architecture not in ARCHITECTURES:
        known = ", ".join(ARCHITECTURES)
        raise ModelFileError(
            path, f"architecture {config.architecture!r} is not supported, only {known} are"
        )
    return config


@dataclass(frozen=True, slots=True)
class OpenedModel:
    """A model that was found fit for its architecture, and no memory taken for it yet."""

    config: ModelConfig
    checkpoint: Checkpoint
    skeleton: Model  # on the meta device

    def load(self, dtype: torch.dtype, device: torch.device | str) -> Model:
        """Load it for inference on plain torch.

        Raises ModelFileError for a tensor that cannot be read and torch.OutOfMemoryError where the
        device has not the room.
        """
        model = _build(self.config, dtype, device)
        load_weights(model, self.checkpoint)
        return model.eval().requires_grad_(False)


def open_model(path: Path | str, *, max_context_tokens: int | None = None) -> OpenedModel:
    """Open a model and check names and shapes of its weights.

    `max_context_tokens` serves a context other than the model's own: a shorter one, or, for models
    whose rope scaling is dynamic, a longer one. Raises ModelFileError for files that are missing,
    damaged or do not fit the architecture, and for a context that the model does not stretch to.
    """
    config = read_config(path)
    if max_context_tokens is not None:
        if max_context_tokens > config.max_context_tokens and config.rope.scaling != "dynamic":
            problem = f"has a context of {config.max_context_tokens} tokens and no dynamic rope "
            problem += f"scaling that would stretch it to {max_context_tokens}"
            raise ModelFileError(path, problem)
        config = replace(config, max_context_tokens=max_context_tokens)
    checkpoint = open_checkpoint(Path(path), config.heads, config.kv_heads)
    if config.num_layers > len(checkpoint.shapes):
        problem = f"claims {config.num_layers} layers but has {len(checkpoint.shapes)} tensors"
        raise ModelFileError(path, problem)
    # Without memory, so that a wrong file is refused before any is taken.
    skeleton = _build(config, torch.float32, "meta")
    check_weights(skeleton, checkpoint, tied=config.tie_embeddings)
    return OpenedModel(config, checkpoint, skeleton)


def load_model(
    path: Path | str,
    *,
    dtype: torch.dtype,
    device: torch.device | str,
    max_context_tokens: int | None = None,
) -> tuple[Model, ModelConfig]:
    """Open a model and load it for plain torch; raises what `open_model` and `load` raise."""
    opened = open_model(path, max_context_tokens=max_context_tokens)
    return opened.load(dtype, device), opened.config


def _build(config: ModelConfig, dtype: torch.dtype, device: torch.device | str) -> Model:
    previous = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            return ARCHITECTURES[config.architecture](config)
    finally:
        torch.set_default_dtype(previous)
