"""What `meshserve models show` tells of a model, before anything loads it."""

from __future__ import annotations
