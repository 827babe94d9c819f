"""Model families and how to load them."""

from __future__ import annotations

from services.engine.core.model_config import ModelConfig
from services.engine.core.models.base import Model
from services.engine.core.models.dtype import resolve_dtype
from services.engine.core.models.loader import load_model, read_config

__all__ = ["Model", "ModelConfig", "load_model", "read_config", "resolve_dtype"]
