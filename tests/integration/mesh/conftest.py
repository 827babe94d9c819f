"""One mesh for all tests of this folder that leave it as they found it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.mesh import Mesh
from tests.support.otlp import Receiver


@pytest.fixture(scope="session")
def otlp() -> Iterator[Receiver]:
    """A receiver of all spans of the shared mesh."""
    receiver = Receiver()
    yield receiver
    receiver.close()


@pytest.fixture(scope="session")
def mesh(
    tmp_path_factory: pytest.TempPathFactory, demo_model_path: Path, otlp: Receiver
) -> Iterator[Mesh]:
    """The shared mesh, with the demo model in float32 and every trace exported."""
    started = Mesh(tmp_path_factory.mktemp("mesh"), {"telemetry": {"otlp_endpoint": otlp.endpoint}})
    with started:
        # What is asked for once, such as the policy in force, is no part of the traces to come.
        with started.client() as client:
            client.chat("Hello", temperature=0, max_tokens=2)
        yield started
