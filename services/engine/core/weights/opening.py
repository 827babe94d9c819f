"""From a path to a checkpoint."""

from __future__ import annotations

from pathlib import Path

from services.engine.core.weights.checkpoint import Checkpoint, SafetensorsCheckpoint
from services.engine.core.weights.gguf_checkpoint import GGUFCheckpoint
from services.runtime.modelfiles.gguf_model import GGUFModel


def open_checkpoint(path: Path, heads: int, kv_heads: int) -> Checkpoint:
    """Open a HF directory or a .gguf file; the head counts undo GGUF's order of rows.

    Raises ModelFileError for what is damaged, missing or stored as pickled Python objects, which
    are never loaded because they can run code.
    """
    if path.is_dir():
        return SafetensorsCheckpoint(path)
    return GGUFCheckpoint(GGUFModel(path), heads, kv_heads)
