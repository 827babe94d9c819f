"""JSON files that describe a model: as `services.runtime.modelfiles.fields` reads them."""

from __future__ import annotations

from services.runtime.modelfiles.fields import Fields, read_json

__all__ = ["Fields", "read_json"]
