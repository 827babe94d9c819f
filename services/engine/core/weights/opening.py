"""From a path to a checkpoint."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from services.engine.core.weights.checkpoint import (
    Checkpoint,
    PickledCheckpoint,
    SafetensorsCheckpoint,
)
from services.engine.core.weights.gguf_checkpoint import GGUFCheckpoint
from services.engine.core.weights.names import Names
from services.engine.core.weights.shards import has_safetensors
from services.runtime.modelfiles.gguf_model import GGUFModel


def open_checkpoint(
    path: Path,
    names: Names,
    paired_heads: Mapping[str, int] | None = None,
    *,
    allow_pickled: bool = False,
) -> Checkpoint:
    """Open a HF directory or a .gguf file whose tensors have these names.

    paired_heads: the heads of the projections `q` and `k` where a .gguf file has the rows of each
    head in pairs. Raises ModelFileError for what is damaged or missing, and for pickled Python
    objects alone, which can run code, unless `allow_pickled` has them loaded by an unpickler that
    knows tensors and nothing else.
    """
    if path.is_dir():
        if allow_pickled and not has_safetensors(path):
            return PickledCheckpoint(path, names)
        return SafetensorsCheckpoint(path, names)
    return GGUFCheckpoint(GGUFModel(path), names, paired_heads)
