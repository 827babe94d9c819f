"""From a path to a model that can run a step."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch

from services.engine.core.models.base import Model
from services.engine.core.models.config import ModelConfig, config_from_gguf, config_from_hf
from services.engine.core.models.registry import ARCHITECTURES
from services.engine.core.weights.checkpoint import open_checkpoint
from services.engine.core.weights.loading import check_weights, load_weights
from services.runtime.modelfiles import GGUFFile, ModelFileError


def read_config(path: Path | str) -> ModelConfig:
    """Return the shape of the model at `path`, a HF directory or a .gguf file.

    Raises ModelFileError for a file that is missing, damaged or of an unknown architecture.
    """
    path = Path(path)
    if path.is_dir():
        config = config_from_hf(path)
    else:
        with GGUFFile(path) as file:
            config = config_from_gguf(file)
    if config.architecture not in ARCHITECTURES:
        known = ", ".join(ARCHITECTURES)
        raise ModelFileError(
            path, f"architecture {config.architecture!r} is not supported, only {known} are"
        )
    return config


def load_model(
    path: Path | str,
    *,
    dtype: torch.dtype,
    device: torch.device | str,
    max_context_tokens: int | None = None,
) -> tuple[Model, ModelConfig]:
    """Load a model for inference.

    `max_context_tokens` serves a context other than the model's own: a shorter one, or, for models
    whose rope scaling is dynamic, a longer one. Raises ModelFileError for files that are missing,
    damaged or do not fit the architecture, and for a context that the model does not stretch to;
    torch.OutOfMemoryError where the device has not the room.
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
    # Built twice: first without memory, so that a wrong file is refused before any is taken.
    check_weights(_build(config, dtype, "meta"), checkpoint, tied=config.tie_embeddings)
    model = _build(config, dtype, device)
    load_weights(model, checkpoint)
    return model.eval().requires_grad_(False), config


def _build(config: ModelConfig, dtype: torch.dtype, device: torch.device | str) -> Model:
    previous = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            return ARCHITECTURES[config.architecture](config)
    finally:
        torch.set_default_dtype(previous)
