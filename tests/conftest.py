"""What tests of every part share."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

from services.runtime.modelfiles import pull
from tests.support.proofs import pytest_runtest_makereport

__all__ = ["pytest_runtest_makereport"]

# Kernels in Triton are interpreted, unless `make test-gpu` says otherwise: before anything imports
# Triton, which is when its own functions look.
os.environ.setdefault("TRITON_INTERPRET", "1")

BUILD_KERNELS = (
    Path(__file__).parents[1] / "services" / "engine" / "core" / "kernels" / "cpu" / "build.py"
)

# How long an example takes says more of the machine, and who else uses it, than of the code.
settings.register_profile("patient", deadline=None, suppress_health_check=[HealthCheck.too_slow])
# A change is judged by examples that it did not choose and that do not change under it; those that
# nobody has tried yet are for whoever works on the code.
settings.register_profile("ci", settings.get_profile("patient"), derandomize=True)
settings.load_profile("ci" if os.environ.get("CI") else "patient")

# `make test-sanitized` sets it: kernels built with AddressSanitizer and UBSan.
TESTED_KERNELS = os.environ.get("TESTED_KERNELS", "")
if TESTED_KERNELS:
    from services.engine.core.kernels.cpu import library

    library.find_or_build = lambda cache_dir=None: Path(TESTED_KERNELS)


def pytest_sessionstart() -> None:
    """Compile the CPU kernels if they have changed, so that no test waits for that at its start."""
    # A shell that starts the tests in the background has them ignore Ctrl-C, and with them all
    # programs that they start and then interrupt.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    if TESTED_KERNELS:
        return
    subprocess.run([sys.executable, str(BUILD_KERNELS)], check=False, stdout=subprocess.DEVNULL)


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Skip what needs a GPU where there is none, before its fixtures look for one."""
    if item.get_closest_marker("gpu") is not None:
        import torch

        if not torch.cuda.is_available():
            pytest.skip("there is no CUDA device")


@pytest.fixture(scope="session")
def demo_model_path() -> Path:
    """The demo model's GGUF file, fetched once into the user's cache directory."""
    return pull("smollm2-135m")


@pytest.fixture(scope="session")
def minilm_path() -> Path:
    """The encoder of the catalogue, fetched into the cache directory if it is not there."""
    return pull("all-minilm-l6-v2")
