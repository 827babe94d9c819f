"""Models on disk: reading their containers, describing them, fetching and finding them.

Standard library and numpy only, so that every service can look at a model without torch. What looks
into files (`gguf`, `description`) is imported from its module: most have no other use for numpy.
"""

from __future__ import annotations

from services.runtime.modelfiles.catalogue import CATALOGUE, CatalogueModel
from services.runtime.modelfiles.errors import ModelFileError, ModelStoreError
from services.runtime.modelfiles.store import (
    check_source,
    default_cache_dir,
    locate,
    locate_adapter,
    pull,
)

__all__ = [
    "CATALOGUE",
    "CatalogueModel",
    "ModelFileError",
    "ModelStoreError",
    "check_source",
    "default_cache_dir",
    "locate",
    "locate_adapter",
    "pull",
]
