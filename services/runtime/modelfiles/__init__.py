"""Models on disk: reading their containers, describing them, fetching and finding them.

Standard library and numpy only, so that every service can look at a model without torch.
"""

from __future__ import annotations

from services.runtime.modelfiles.errors import ModelFileError, ModelStoreError
from services.runtime.modelfiles.gguf import GGUFFile, GGUFMetadata, GGUFValue, TensorInfo

__all__ = [
    "GGUFFile",
    "GGUFMetadata",
    "GGUFValue",
    "ModelFileError",
    "ModelStoreError",
    "TensorInfo",
]
