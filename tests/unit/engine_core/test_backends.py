"""Which backend computes a model's steps, and what an engine says about the choice."""

from __future__ import annotations

import logging
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from services.engine.core import backends
from services.engine.core.backends import kept_weights
from services.engine.core.errors import StartupError
from services.engine.core.kernels.cpu import library
from services.engine.core.model_config import SparseAttention
from services.engine.core.settings import CoreSettings
from services.engine.core.startup import build_engine
from tests.fakes.paged_step import libraries

pytestmark = pytest.mark.skipif(not libraries(), reason="no native kernels on this machine")

# What the native kernels serve; the hidden size and others are changed from here.
SHAPE = {
    "vocab_size": 50,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}
UNSERVED = {
    "a hidden size of half a group": ({"hidden_size": 48, "head_dim": 16}, "groups of 32, not 48"),
    "a feed-forward layer of half a group": ({"intermediate_size": 80}, "groups of 32, not 80"),
    "one narrow head": ({"num_attention_heads": 1, "num_key_value_heads": 1, "head_dim": 16}, "16"),
    "heads of half a tile": ({"head_dim": 8}, "head_dim is a multiple of 16 .* not 8"),
}


@pytest.fixture(autouse=True)
def threads() -> Any:
    """An engine with native kernels leaves torch one thread."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)
    library.activate("off")


@pytest.fixture
def facts(tmp_path: Path) -> Any:
    def build(changes: dict[str, int] | None = None, **fields: Any) -> Any:
        config = LlamaConfig(**{**SHAPE, **(changes or {})})
        LlamaForCausalLM(config).save_pretrained(tmp_path)
        fields = {"kv_cache_memory_bytes": 1 << 20, "device": "cpu", **fields}
        return build_engine(CoreSettings(model_path=str(tmp_path), **fields))[1]

    return build


@pytest.mark.parametrize("dtype", ["auto", "bfloat16"])
def test_a_cpu_gets_the_native_kernels(facts: Any, caplog: Any, dtype: str) -> None:
    with caplog.at_level(logging.INFO):
        found = facts(dtype=dtype)
    active = library.active()
    assert active is not None
    assert found.dtype == "bfloat16"
    assert found.kernels["step"].startswith(f"{active.isa} (bf16 ")
    assert f"steps run natively: {active.isa}" in caplog.text


@pytest.mark.parametrize("isa", [each.isa for each in libraries()])
def test_the_instruction_set_that_is_asked_for_is_taken(facts: Any, isa: str) -> None:
    assert facts(cpu_kernels=isa).kernels["step"].startswith(f"{isa} (")


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"dtype": "float32"}, "the dtype is float32"),
        ({"block_size": 8}, "blocks of 8 tokens are no multiple of 16"),
        ({"block_size": 24}, "blocks of 24 tokens are no multiple of 16"),
        ({"cpu_kernels": "off"}, "switched off by engine.cpu_kernels"),
    ],
)
def test_settings_that_need_torch_get_torch_and_the_log_says_why(
    facts: Any, caplog: Any, fields: dict[str, Any], reason: str
) -> None:
    with caplog.at_level(logging.INFO):
        found = facts(**fields)
    assert "step" not in found.kernels
    assert f"steps run on torch: {reason}" in caplog.text
    with pytest.raises(StartupError, match=f"weights in int8 need the native kernels .*{reason}"):
        facts(weights="int8", **fields)


@pytest.mark.parametrize(("changes", "reason"), UNSERVED.values(), ids=UNSERVED.keys())
def test_models_that_the_kernels_do_not_serve_get_torch(
    facts: Any, caplog: Any, changes: dict[str, int], reason: str
) -> None:
    with caplog.at_level(logging.INFO):
        found = facts(changes)
    assert "step" not in found.kernels
    assert "steps run on torch: the native kernels do not serve this model" in caplog.text
    for weights in ("int8", "int4"):
        with pytest.raises(StartupError, match=f"weights in {weights} need .*{reason}"):
            facts(changes, weights=weights)


def test_missing_kernels_are_named_as_the_reason(
    facts: Any, caplog: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def nowhere(cache_dir: Path | None = None) -> Path:
        raise library.UnavailableError("there is no compiler", "install one")

    monkeypatch.setattr(library, "find_or_build", nowhere)
    with caplog.at_level(logging.INFO):
        facts()
    assert "steps run on torch: there is no compiler" in caplog.text
    with pytest.raises(StartupError, match=r"weights in int4 need .* there is no compiler"):
        facts(weights="int4")


@pytest.mark.parametrize(("weights", "name"), [("int8", "q8"), ("int4", "q4")])
def test_weights_are_quantised_on_request(facts: Any, weights: str, name: str) -> None:
    assert f"{name} " in facts(weights=weights).kernels["step"]


@pytest.mark.parametrize("cpu_kernels", ["auto", "off"])
def test_an_int8_cache_takes_little_over_half_the_memory(facts: Any, cpu_kernels: str) -> None:
    room = {
        "kv_cache_memory_bytes": 1 << 16,
        "max_running_sequences": 512,
        "dtype": "bfloat16",
        "cpu_kernels": cpu_kernels,
    }
    bf16 = facts(**room).num_blocks
    assert facts(kv_cache_format="int8", **room).num_blocks > 1.5 * bf16


def test_a_cache_of_eight_bit_floats_is_for_those_who_compute_on_torch(facts: Any) -> None:
    room = {"kv_cache_memory_bytes": 1 << 16, "max_running_sequences": 512, "dtype": "bfloat16"}
    bf16 = facts(cpu_kernels="off", **room).num_blocks
    found = facts(cpu_kernels="off", kv_cache_format="fp8", **room)
    assert found.num_blocks >= 2 * bf16
    with pytest.raises(StartupError, match="fp8 is for a GPU"):
        facts(kv_cache_format="fp8")


@pytest.mark.parametrize("weights", ["fp8", "w8a8"])
def test_products_of_eight_bits_by_eight_are_for_a_gpu(facts: Any, weights: str) -> None:
    for kernels in ("auto", "off"):
        with pytest.raises(StartupError, match=f"weights in {weights} are for a GPU: on a CPU"):
            facts(weights=weights, cpu_kernels=kernels)


def kept(weights: Any, dtype: torch.dtype = torch.bfloat16, device: str = "cuda:0") -> str:
    settings = CoreSettings(model_path="", weights=weights)
    return kept_weights(settings, torch.device(device), dtype)


def test_a_gpu_keeps_what_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (9, 0))
    for weights in ("auto", "bfloat16", "int8", "int4", "fp8", "w8a8"):
        assert kept(weights, torch.float16) == weights
    assert kept("auto", device="cpu") == "bfloat16"


def test_a_gpu_that_has_no_eight_bit_floats_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (8, 0))
    assert kept("w8a8") == "w8a8"
    with pytest.raises(StartupError, match=r"need compute capability 8.9, and cuda:0 has 8.0"):
        kept("fp8")


def test_few_bits_go_with_activations_of_sixteen() -> None:
    assert kept("auto", torch.float32) == "bfloat16"
    with pytest.raises(StartupError, match="weights in int4 go with a dtype of 16 bits"):
        kept("int4", torch.float32)


def test_an_engine_on_torch_says_what_its_weights_are_kept_in(
    facts: Any, caplog: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(backends, "kept_weights", lambda *_: "int4")
    with caplog.at_level(logging.INFO):
        found = facts(cpu_kernels="off", dtype="bfloat16")
    stored = found.kernels["weights"]
    assert {part.split()[0] for part in stored.split(", ")} == {"int4", "int8", "bfloat16"}
    assert re.search(f"steps run on torch: .*; weights {stored}", caplog.text)


def test_attention_to_a_window_alone_is_native_and_to_global_tokens_too_is_not(
    facts: Any, caplog: Any
) -> None:
    assert "step" in facts(sparse_attention=SparseAttention(8)).kernels
    with caplog.at_level(logging.INFO):
        found = facts(sparse_attention=SparseAttention(8, 4))
    assert "step" not in found.kernels
    assert "do not serve this model: sparse_attention has global tokens" in caplog.text
