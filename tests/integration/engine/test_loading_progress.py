"""How far a core is with its weights is logged, and told to those who ask why it does not serve."""

from __future__ import annotations

import asyncio
import sys

import pytest

from services.engine.core.settings import CoreSettings
from services.engine.core_client import CoreClient
from services.engine.request_stream import CoreUnavailableError

# A core that has read 60 of 100 bytes, and reads no further.
STUCK = """
import logging, sys, time
from services.engine.core.process import run
from services.engine.core.weights import progress

def build_engine(settings):
    progress._INTERVAL_S = 0.0
    reading = progress.ReadingProgress(100)
    reading.add(60)
    reading.report()
    time.sleep(600)

sys.exit(run(int(sys.argv[1]), build_engine))
"""


async def test_a_core_that_starts_says_how_far_it_is(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    client = CoreClient(CoreSettings(model_path="any"), command=(sys.executable, "-c", STUCK))
    starting = asyncio.create_task(client.start())
    try:
        async with asyncio.timeout(60):
            while "weights read" not in caplog.text:
                await asyncio.sleep(0.05)
        with pytest.raises(CoreUnavailableError, match="starting: 60% of its weights are read"):
            client.check_health()
    finally:
        starting.cancel()
        await client.close()
