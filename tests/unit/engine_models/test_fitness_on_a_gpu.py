"""What is said of a model before it is loaded, where there is a GPU."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from services.engine.core import fitness
from services.engine.core.fitness import examine
from services.engine.core.models.kept import KEPT_WEIGHTS, bytes_by_precision
from services.engine.core.models.loader import open_model
from tests.fakes.quantised_checkpoints import float_config, fp8, quantise_checkpoint
from tests.unit.engine_models.test_quantised_checkpoints import WIDE


@pytest.fixture(autouse=True)
def gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (9, 0))
    monkeypatch.setattr(fitness, "free_memory_bytes", lambda device: 80 << 30)


def test_it_would_take_what_each_setting_has_it_keep(make_checkpoint: Any, tmp_path: Path) -> None:
    directory, _ = make_checkpoint(**WIDE)
    found = examine(directory, cache_dir=tmp_path)
    assert found.device == "cuda:0"
    assert tuple(found.footprints) == KEPT_WEIGHTS
    for weights, footprint in found.footprints.items():
        model, _ = open_model(directory).load_kept(weights, torch.bfloat16, "cpu")
        assert footprint.weight_bytes == bytes_by_precision(model)
    sizes = {weights: each.total_weight_bytes for weights, each in found.footprints.items()}
    assert sizes["int4"] < sizes["fp8"] <= sizes["int8"] < sizes["auto"] == sizes["bfloat16"]


def test_what_a_card_does_not_multiply_it_is_not_offered(
    make_checkpoint: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    directory, reference = make_checkpoint(**WIDE)
    quantise = partial(fp8, block=(1, None))
    quantise_checkpoint(directory, reference, quantise, float_config("channel"))
    assert "fp8" in examine(directory, cache_dir=tmp_path).footprints["auto"].weight_bytes
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (8, 0))
    found = examine(directory, cache_dir=tmp_path).footprints
    assert "fp8" not in found
    assert set(found["auto"].weight_bytes) == {"int8", "bfloat16"}


def test_in_float32_nothing_is_kept_in_few_bits(make_checkpoint: Any, tmp_path: Path) -> None:
    directory, _ = make_checkpoint(**WIDE)
    assert set(examine(directory, dtype="float32", cache_dir=tmp_path).footprints) == {
        "auto",
        "bfloat16",
    }
