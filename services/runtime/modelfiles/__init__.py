"""Models on disk: reading their containers, describing them, fetching and finding them.

Standard library and numpy only, so that every service can look at a model without torch.
"""

from __future__ import annotations

from services.runtime.modelfiles.catalogue import CATALOGUE, CatalogueModel
from services.runtime.modelfiles.description import ModelDescription, describe
from services.runtime.modelfiles.errors import ModelFileError, ModelStoreError
from services.runtime.modelfiles.gguf import GGUFFile, GGUFMetadata, GGUFValue, TensorInfo
from services.runtime.modelfiles.store import check_source, default_cache_dir, locate, pull

__all__ = [
    "CATALOGUE",
    "CatalogueModel",
    "GGUFFile",
    "GGUFMetadata",
    "GGUFValue",
    "ModelDescription",
    "ModelFileError",
    "ModelStoreError",
    "TensorInfo",
    "check_source",
    "default_cache_dir",
    "describe",
    "locate",
    "pull",
]
