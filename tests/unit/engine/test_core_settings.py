"""What the core of each model is told: its own settings, and its part of what models share."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch

from services.engine import service
from services.engine.core import memory
from services.engine.core.model_config import SparseAttention
from services.engine.core.settings import CoreSettings
from services.engine.core_client import CoreClient
from services.runtime.settings import Settings, parse_settings
from tests.unit.engine.test_validation import FACTS

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


def test_a_core_is_told_what_models_that_are_not_in_memory_will_take(tmp_path: Path) -> None:
    def model(name: str, architecture: str, size: int) -> dict[str, Any]:
        directory = tmp_path / name
        directory.mkdir()
        (directory / "config.json").write_text(json.dumps({"architectures": [architecture]}))
        (directory / "model.safetensors").write_bytes(bytes(size))
        return {"source": str(directory)}

    models = {
        "one": model("one", "LlamaForCausalLM", 100),
        "two": model("two", "Qwen3MoeForCausalLM", 200),
        "encoder": model("encoder", "BertModel", 30),
        "sized": {**model("sized", "GPT2LMHeadModel", 400), "kv_cache_bytes": GIB},
        "embeds": model("embeds", "Qwen3ForCausalLM", 5),
        "missing": {"source": str(tmp_path / "missing")},
    }
    (tmp_path / "embeds" / "modules.json").write_text("[]")
    settings = settings_of(models)
    others = [name for name in models if name != "one"]
    told = service.core_settings(settings, "one", others)
    assert told.waiting_models == 5
    assert told.waiting_caches == 1
    assert told.waiting_weights_bytes == 200 + 30 + 400 + 5
    assert told.waiting_cache_bytes == GIB
    alone = service.core_settings(settings, "one")
    assert (alone.waiting_models, alone.waiting_caches, alone.waiting_weights_bytes) == (0, 0, 0)


async def test_a_core_that_takes_the_place_of_another_on_a_gpu_takes_no_more_of_it() -> None:
    first = CoreSettings(model_path="", waiting_models=2, waiting_caches=1, waiting_weights_bytes=9)
    client = CoreClient(first)
    started = client._first_start = asyncio.get_running_loop().create_future()
    assert client._next_settings() == first
    client.facts = msgspec.structs.replace(FACTS, device="cuda:0", kv_cache_memory_bytes=7 * GIB)
    # What was known before it slept does not bind it when it is loaded again.
    assert client._next_settings() == first
    started.set_result(client.facts)
    assert client._next_settings() == CoreSettings(model_path="", kv_cache_limit_bytes=7 * GIB)
    client.facts = FACTS
    assert client._next_settings() == first


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
