"""Kernels in Triton are interpreted here: they compute on the CPU, and are held to the references.
With TRITON_INTERPRET=0, as `make test-gpu` has it, tests of a GPU run them there.

Whether they compile for a GPU is what test_compiling sees, in a process of its own.
"""

from __future__ import annotations

import os
from collections.abc import Iterator

# Before the first kernel is decorated: that is when Triton looks.
os.environ.setdefault("TRITON_INTERPRET", "1")

import pytest
import torch

from services.engine.core.kernels import triton


@pytest.fixture(scope="session", autouse=True)
def interpreted() -> None:
    triton.activate()
    assert triton.why_not() is None, triton.why_not()


@pytest.fixture
def unwritten_is_no_number() -> Iterator[None]:
    """New tensors are full of NaN: what is not written shows, and what must not be read."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)
