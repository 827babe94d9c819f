"""From a path to a checkpoint."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from services.engine.core.weights.checkpoint import Checkpoint, SafetensorsCheckpoint
from services.engine.core.weights.gguf_checkpoint import GGUFCheckpoint
from services.engine.core.weights.names import Names
from services.runtime.modelfiles.gguf_model import GGUFModel


def open_checkpoint(
    path: Path, names: Names, paired_heads: Mapping[str, int] | None = None
) -> Checkpoint:
    """Open a HF directory or a .gguf file whose tensors have these names.

    paired_heads: the heads of the projections `q` and `k` where a .gguf file has the rows of each
    head in pairs. Raises ModelFileError for what is damaged, missing or stored as pickled Python
    objects, which are never loaded because they can run code.
    """
    if path.is_dir():
        return SafetensorsCheckpoint(path, names)
    return GGUFCheckpoint(GGUFModel(path), names, paired_heads)
