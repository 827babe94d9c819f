"""Models that can be quantised, on one thread."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from services.engine.core.kernels import cpu, select
from tests.fakes.decoder_families import COMMON


@pytest.fixture(autouse=True)
def kernels() -> Iterator[None]:
    select("cpu")
    cpu.activate("auto")
    threads = torch.get_num_threads()
    # For models this small, waking others costs more than they save.
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def whole_groups(monkeypatch: pytest.MonkeyPatch) -> None:
    """Models of all families with inputs in groups of 32."""
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4}
    for name, size in sizes.items():
        monkeypatch.setitem(COMMON, name, size)
