"""Shared building blocks of model families."""

from __future__ import annotations

from services.engine.core.layers.attention import PagedAttention
from services.engine.core.layers.linear import Embedding, Linear, MergedLinear
from services.engine.core.layers.norm import RMSNorm
from services.engine.core.layers.rotary import RopeConfig, RotaryEmbedding

__all__ = [
    "Embedding",
    "Linear",
    "MergedLinear",
    "PagedAttention",
    "RMSNorm",
    "RopeConfig",
    "RotaryEmbedding",
]
