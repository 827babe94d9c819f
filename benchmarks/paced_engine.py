"""The engine service around a paced core: `python -m benchmarks.paced_engine --config FILE`."""

from __future__ import annotations

from benchmarks.paced_core import COMMAND
from services.engine.service import EngineService
from services.runtime.server import run
from services.runtime.settings import Settings
from services.runtime.telemetry import Metrics


def make_service(settings: Settings, metrics: Metrics) -> EngineService:
    """The service with the other core."""
    return EngineService(settings, metrics, core_command=COMMAND)


if __name__ == "__main__":
    run(make_service, EngineService.name)
