"""The health that a service tells is that of its probe, and NOT_SERVING once it shuts down."""

from __future__ import annotations

import asyncio
import logging
from unittest.mock import AsyncMock

import pytest
from grpc_health.v1 import health_pb2

from services.runtime import health
from services.runtime.health import LIVENESS, NOT_SERVING, SERVING, HealthMonitor
from services.runtime.telemetry import Metrics

NAME = "test.Shapes"


class Probe:
    """Fails, or hangs, as it is told."""

    def __init__(self) -> None:
        self.error: Exception | None = None
        self.hangs = False

    async def __call__(self) -> None:
        if self.hangs:
            await asyncio.Event().wait()
        if self.error is not None:
            raise self.error


@pytest.fixture(autouse=True)
def _quickly(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(health, "PROBE_INTERVAL_S", 0.01)
    monkeypatch.setattr(health, "PROBE_TIMEOUT_S", 0.05)


@pytest.fixture
def probe() -> Probe:
    return Probe()


@pytest.fixture
def metrics() -> Metrics:
    return Metrics("cache")


@pytest.fixture
def monitor(probe: Probe, metrics: Metrics) -> HealthMonitor:
    return HealthMonitor([NAME], probe, metrics)


async def status(monitor: HealthMonitor, name: str = NAME) -> int:
    request = health_pb2.HealthCheckRequest(service=name)
    response = await monitor.servicer.Check(request, None)  # type: ignore[arg-type]
    return int(response.status)


async def until(monitor: HealthMonitor, wanted: int) -> None:
    async with asyncio.timeout(30):
        while await status(monitor) != wanted:
            await asyncio.sleep(0.005)


async def test_the_first_answer_is_true_already(monitor: HealthMonitor, probe: Probe) -> None:
    probe.error = RuntimeError("sick")
    await monitor.start()
    assert await status(monitor) == await status(monitor, "") == NOT_SERVING
    await monitor.shut_down()


async def test_health_follows_the_probe_and_says_why(
    monitor: HealthMonitor, probe: Probe, metrics: Metrics, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    await monitor.start()
    assert await status(monitor) == SERVING
    assert metrics.registry.get_sample_value("meshserve_healthy") == 1
    probe.error = RuntimeError("the core is silent")
    await until(monitor, NOT_SERVING)
    assert metrics.registry.get_sample_value("meshserve_healthy") == 0
    await asyncio.sleep(0.05)
    probe.error = None
    await until(monitor, SERVING)
    assert [record.getMessage() for record in caplog.records] == [
        "not serving: the core is silent",
        "serving again",
    ]
    await monitor.shut_down()


async def test_a_probe_that_hangs_is_a_probe_that_fails(
    monitor: HealthMonitor, probe: Probe
) -> None:
    await monitor.start()
    probe.hangs = True
    await until(monitor, NOT_SERVING)
    probe.hangs = False
    await until(monitor, SERVING)
    await monitor.shut_down()


async def test_nothing_serves_again_after_the_shutdown(
    monitor: HealthMonitor, metrics: Metrics
) -> None:
    await monitor.start()
    await monitor.shut_down()
    await asyncio.sleep(0.05)
    monitor.servicer.set([NAME], SERVING)
    assert await status(monitor) == await status(monitor, "") == NOT_SERVING
    assert metrics.registry.get_sample_value("meshserve_healthy") == 0


async def test_a_process_that_answers_is_alive_whether_it_serves_or_not(
    monitor: HealthMonitor, probe: Probe
) -> None:
    probe.error = RuntimeError("another service is away")
    await monitor.start()
    assert await status(monitor, LIVENESS) == SERVING
    await monitor.shut_down()
    assert await status(monitor, LIVENESS) == SERVING


async def test_a_watcher_sees_each_change_and_is_sent_away_at_the_end(
    monitor: HealthMonitor,
) -> None:
    monitor.servicer.set([NAME], SERVING)

    async def watch(name: str) -> list[int]:
        request = health_pb2.HealthCheckRequest(service=name)
        responses = monitor.servicer.Watch(request, AsyncMock())
        return [response.status async for response in responses]

    watching = asyncio.gather(watch(NAME), watch("unknown"))
    await asyncio.sleep(0.01)
    monitor.servicer.set([NAME], NOT_SERVING)
    await asyncio.sleep(0.01)
    monitor.servicer.set([NAME], NOT_SERVING)
    await asyncio.sleep(0.01)
    monitor.servicer.set([NAME], SERVING)
    await asyncio.sleep(0.01)
    await monitor.shut_down()
    async with asyncio.timeout(1):
        known, unknown = await watching
    assert known == [SERVING, NOT_SERVING, SERVING, NOT_SERVING]
    assert unknown == [health_pb2.HealthCheckResponse.SERVICE_UNKNOWN]
