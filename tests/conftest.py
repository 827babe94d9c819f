"""What tests of every part share."""

from __future__ import annotations

from pathlib import Path

import pytest

from services.runtime.modelfiles import pull


@pytest.fixture(scope="session")
def demo_model_path() -> Path:
    """The demo model's GGUF file, fetched once into the user's cache directory."""
    return pull("smollm2-135m")
