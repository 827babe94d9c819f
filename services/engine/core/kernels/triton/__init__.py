"""The ops of a GPU in Triton (Tillet et al., MAPL '19): compiled at the first step of their shape.

They register where `activate` is called, and without Triton there are none of them. Where
TRITON_INTERPRET is set they are interpreted instead, and compute on a CPU: so tests run them.
"""

from __future__ import annotations

import importlib
import importlib.util
import pkgutil

_reason = "no engine has been started on a GPU"


def activate() -> None:
    """Import all modules of this package, which register what they implement.

    Without Triton this does nothing, and `why_not` says so.
    """
    global _reason
    if importlib.util.find_spec("triton") is None:
        _reason = "Triton is not installed"
        return
    for module in pkgutil.iter_modules(__path__, f"{__name__}."):
        importlib.import_module(module.name)
    _reason = ""


def why_not() -> str | None:
    """Why there are no kernels in Triton; None where there are."""
    return _reason or None
