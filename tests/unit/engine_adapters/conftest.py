"""Small models with adapters, read as an engine reads them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from services.engine.core.adapters.reading import read_adapter
from services.engine.core.adapters.targets import Targets
from services.engine.core.models.loader import open_model
from tests.fakes.adapters import add_adapters
from tests.fakes.decoder_families import save_model

# Sizes that the kernels serve.
SERVED: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_attention_heads": 4,
    "head_dim": 16,
    "max_position_embeddings": 160,
    "initializer_range": 0.1,
}
CHANGES: dict[str, dict[str, Any]] = {
    "phi3": {"head_dim": None},
    "gpt2": {"head_dim": None, "n_inner": 96},
}


@pytest.fixture
def make_adapted(tmp_path: Path) -> Callable[..., tuple[Any, Path, dict[str, Any]]]:
    """Write a model of a case, and adapters beside it; returns it with them as PEFT has it, its
    directory, and what is read of each adapter."""

    def make(case: str, **configs: dict[str, Any]) -> tuple[Any, Path, dict[str, Any]]:
        changes = SERVED | CHANGES.get(case.split(",")[0], {})
        model = save_model(
            case, tmp_path / "model", **{k: v for k, v in changes.items() if v is not None}
        )
        adapted = add_adapters(model, tmp_path / "adapters", **configs)
        targets = Targets.of_model(open_model(tmp_path / "model").skeleton)
        read = {
            name: read_adapter(tmp_path / "adapters" / name, targets, max_rank=64)
            for name in configs
        }
        return adapted, tmp_path / "model", read

    return make
