"""CUDA kernels compute on the CPU here, by the emulator, and are held to the references."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from services.engine.core.kernels import cuda
from tests.fakes.cuda import emulator
from tests.fakes.cuda.emulator import Emulator


@pytest.fixture
def emulated() -> Iterator[Emulator]:
    cuda.register()
    with emulator.in_use() as kernels:
        yield kernels


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)
