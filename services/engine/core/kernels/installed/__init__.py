"""Ops of a GPU by libraries that a user may have installed: FlashAttention-3 and FlashInfer.

They register before our own, which are preferred where they run. So they are used where ours are
refused or excluded, and are what ours are measured beside.
"""

from __future__ import annotations

import importlib


def activate() -> None:
    """Register them; each says why it cannot be used, where it cannot."""
    for name in ("flash_attention", "flash_infer"):
        importlib.import_module(f"{__name__}.{name}")
