"""The test service as a process: `python -m tests.fakes.shapes_service --config FILE`.

SHAPES_START says how it starts: `refuse`, `crash`, `time_out` or `hang`. While the file that
SHAPES_SICK names exists its probe fails.
"""

from __future__ import annotations

import asyncio
import os
import sys
from pathlib import Path

import grpc

from services.runtime.server import Service, StartupError, run
from services.runtime.settings import Settings
from services.runtime.telemetry import Metrics
from tests.fakes.shapes import SERVICE, Shapes


class ShapesService(Service):
    """Stands in for the cache, whose settings it reads."""

    name = "cache"
    grpc_services = (SERVICE,)

    def __init__(self, settings: Settings, metrics: Metrics) -> None:
        super().__init__(settings, metrics)
        self._shapes = Shapes()

    def register(self, server: grpc.aio.Server) -> None:
        self._shapes.add_to(server)

    async def start(self) -> None:
        match os.environ.get("SHAPES_START"):
            case "refuse":
                raise StartupError("the model is missing", "pull it")
            case "crash":
                raise RuntimeError("a defect")
            case "time_out":
                raise TimeoutError("too slow")
            case "hang":
                await asyncio.Event().wait()

    async def probe(self) -> None:
        if Path(os.environ.get("SHAPES_SICK", "/nonexistent")).exists():
            raise RuntimeError("sick")

    async def stop(self) -> None:
        released = self._shapes.released.is_set()
        sys.stderr.write(f"stopped; released {released}\n")


if __name__ == "__main__":
    run(ShapesService, ShapesService.name)
