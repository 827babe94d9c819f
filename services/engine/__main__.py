"""`python -m services.engine` runs an engine."""

from __future__ import annotations

from services.engine.service import EngineService
from services.runtime.server import run

if __name__ == "__main__":
    run(EngineService, EngineService.name)
