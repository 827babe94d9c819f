"""Checkpoints: safetensors and GGUF, and how their tensors become a model's parameters."""

from __future__ import annotations

from services.engine.core.weights.checkpoint import Checkpoint
from services.engine.core.weights.loading import load_weights

__all__ = ["Checkpoint", "load_weights"]
