"""What the core of each model is told: its own settings, and its part of what models share."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch

from services.engine import service
from services.engine.core import memory
from services.engine.core.model_config import SparseAttention
from services.engine.core.settings import CoreSettings
from services.runtime.settings import Settings, parse_settings

GIB = 2**30


@pytest.fixture(autouse=True)
def _any_model_is_here(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(service, "locate", lambda source, cache: Path(source))


def settings_of(models: dict[str, Any], **engine: Any) -> Settings:
    return parse_settings({"models": models, "engine": engine}, {})


def core(settings: Settings, name: str) -> CoreSettings:
    return service.core_settings(settings, name)


def budget_bytes(share: float = 1.0, waiting_weights_bytes: int = 0) -> int:
    return memory.kv_cache_budget_bytes(
        torch.device("cuda"),
        requested_bytes=None,
        fraction=0.5,
        share=share,
        waiting_weights_bytes=waiting_weights_bytes,
    )


def test_an_engine_hosts_the_models_that_are_at_its_target() -> None:
    far = "dns:///far:50053"
    models = {
        "one": {"source": "one"},
        "far": {"source": "far", "engine_target": far},
        "two": {"source": "two"},
    }
    assert settings_of(models).engine_models == ("one", "two")
    assert settings_of(models, model="two").engine_models == ("two",)
    assert settings_of(models, target=far).engine_models == ("one", "far", "two")
    own = {name: {**model, "engine_target": f"dns:///{name}:1"} for name, model in models.items()}
    assert settings_of(own, target="dns:///two:1").engine_models == ("two",)
    assert settings_of(own).engine_models == ("one",)


def test_models_have_equal_parts_of_what_caches_may_take_unless_one_has_its_own_size() -> None:
    models = {
        "one": {"source": "one"},
        "two": {"source": "two", "kv_cache_bytes": GIB, "weights": "int8"},
    }
    settings = settings_of(models)
    one, two = core(settings, "one"), core(settings, "two")
    assert (one.memory_share, one.kv_cache_memory_bytes, one.weights) == (0.5, None, "auto")
    assert (two.memory_share, two.kv_cache_memory_bytes, two.weights) == (0.5, GIB, "int8")
    assert core(settings_of(models, model="one"), "one").memory_share == 1.0
    assert core(settings_of(models, kv_cache_bytes=5), "one").kv_cache_memory_bytes == 5


def test_the_first_model_leaves_room_for_the_weights_and_the_cache_of_the_second(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    free_bytes = 100 * GIB
    monkeypatch.setattr(memory, "free_memory_bytes", lambda _: free_bytes)
    assert budget_bytes() == 50 * GIB
    first = budget_bytes(0.5, waiting_weights_bytes=60 * GIB)
    assert first == 10 * GIB
    free_bytes -= first + 60 * GIB
    assert 0 < budget_bytes(0.5) <= first
    assert budget_bytes(0.5, waiting_weights_bytes=200 * GIB) == 0


def test_the_weights_of_a_folder_are_those_of_one_format(tmp_path: Path) -> None:
    for name, size in (
        ("a-1.safetensors", 300),
        ("a-2.safetensors", 200),
        ("pytorch_model.bin", 450),
        ("tokenizer.json", 9000),
    ):
        (tmp_path / name).write_bytes(bytes(size))
    settings = settings_of({"m": {"source": str(tmp_path)}, "n": {"source": str(tmp_path / "x")}})
    assert service.weight_bytes(settings, "m") == 500
    file = settings_of({"m": {"source": str(tmp_path / "a-1.safetensors")}})
    assert service.weight_bytes(file, "m") == 300


def test_attention_to_part_of_a_context_reaches_the_core_as_it_was_set() -> None:
    models = {
        "all": {"source": "all"},
        "part": {"source": "part", "sparse_attention": {"window": 4096}},
    }
    settings = settings_of(models)
    assert core(settings, "all").sparse_attention is None
    told = msgspec.msgpack.decode(msgspec.msgpack.encode(core(settings, "part")), type=CoreSettings)
    assert told.sparse_attention == SparseAttention(window=4096, global_tokens=64)
