"""`python -m services.cache` runs the response cache."""

from __future__ import annotations

from services.cache.service import CacheService
from services.runtime.server import run

if __name__ == "__main__":
    run(CacheService, CacheService.name)
