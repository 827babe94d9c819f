"""What a replica says of how it does; the rest is held by the process itself (test_process.py)."""

from __future__ import annotations

import asyncio

from meshserve.v1 import monitor_pb2
from services.runtime.health import HealthMonitor
from services.runtime.monitor import Monitor
from services.runtime.telemetry import Metrics


async def test_a_replica_that_shuts_down_says_that_it_drains() -> None:
    async def healthy() -> None:
        return None

    metrics, draining = Metrics("cache"), asyncio.Event()
    health = HealthMonitor([], healthy, metrics)
    monitor = Monitor(health, metrics, draining)
    await health.start()
    assert monitor.status().state == monitor_pb2.REPLICA_STATE_SERVING
    await health.shut_down()
    draining.set()
    assert monitor.status().state == monitor_pb2.REPLICA_STATE_DRAINING
