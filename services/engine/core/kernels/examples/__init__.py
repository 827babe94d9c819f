"""Calls of every op, of known numbers: what implementations are held to their references with.

An implementation gets the same arguments as the reference, made anew for it, because ops may write
into theirs: what they wrote is compared too.
"""

from __future__ import annotations

from services.engine.core.kernels.examples import attention, layers, products, sampling
from services.engine.core.kernels.examples.base import (
    EXAMPLES,
    LLAMA_8B,
    SMALL,
    TINY,
    Example,
    Maker,
    Sizes,
    difference,
)

__all__ = [
    "EXAMPLES",
    "LLAMA_8B",
    "SMALL",
    "TINY",
    "Example",
    "Maker",
    "Sizes",
    "attention",
    "difference",
    "layers",
    "products",
    "sampling",
]
