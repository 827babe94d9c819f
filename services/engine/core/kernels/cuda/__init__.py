"""The ops of a GPU in CUDA C++: compiled at the first start, into one library for all cards.

They register where `activate` is called, after those in Triton, which they are preferred to and
hand on to what they do not serve. Without nvcc there are none of them.
"""

from __future__ import annotations

import importlib
import pkgutil
from pathlib import Path

import torch

from services.engine.core.kernels.cuda import library
from services.engine.core.kernels.cuda.library import why_not

__all__ = ["activate", "register", "why_not"]


def activate(device: torch.device, cache_dir: Path | None = None) -> None:
    """Find or compile the kernels for a device, and register them.

    What was found, or what is missed and how to get it, is logged in one line. Never raises:
    without these kernels there are those in Triton.
    """
    library.activate(device, cache_dir)
    register()


def register() -> None:
    """Import all modules of this package, which register what they implement."""
    for module in pkgutil.iter_modules(__path__, f"{__name__}."):
        importlib.import_module(module.name)
