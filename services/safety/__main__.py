"""`python -m services.safety` runs the safety filter."""

from __future__ import annotations

from services.runtime.server import run
from services.safety.service import SafetyService

if __name__ == "__main__":
    run(SafetyService, SafetyService.name)
