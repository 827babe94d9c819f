"""The ops of a CPU in C++: compiled at install or at the first start, one set per instruction set.

Without a compiler or on another processor there are none of them, and the references run.
"""

from __future__ import annotations

from services.engine.core.kernels.cpu import (
    adapter_check,
    encoder_check,
    family_check,
    sampling,
    self_check,
)
from services.engine.core.kernels.cpu.library import Library, activate, active, why_not

# Imported for what they register: implementations of ops, and checks of kernels.
__all__ = [
    "Library",
    "activate",
    "active",
    "adapter_check",
    "encoder_check",
    "family_check",
    "sampling",
    "self_check",
    "why_not",
]
