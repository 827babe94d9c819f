"""Shared building blocks of model families."""

from __future__ import annotations

from services.engine.core.layers.attention import Attention, PagedAttention, StepContext
from services.engine.core.layers.feed_forward import (
    ExpertMatrices,
    Experts,
    FeedForward,
    GatedFeedForward,
    MixtureOfExperts,
)
from services.engine.core.layers.linear import Embedding, Linear, MergedLinear
from services.engine.core.layers.norm import LayerNorm, RMSNorm
from services.engine.core.layers.rotary import RotaryEmbedding

__all__ = [
    "Attention",
    "Embedding",
    "ExpertMatrices",
    "Experts",
    "FeedForward",
    "GatedFeedForward",
    "LayerNorm",
    "Linear",
    "MergedLinear",
    "MixtureOfExperts",
    "PagedAttention",
    "RMSNorm",
    "RotaryEmbedding",
    "StepContext",
]
