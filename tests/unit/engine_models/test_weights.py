"""Weights are read exactly or refused by name; nothing is missing, left over or run as code."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from services.engine.core.models import load_model
from services.engine.core.settings import CoreSettings
from services.engine.core.startup import build_engine
from services.runtime.modelfiles import ModelFileError
from tests.fakes.gguf_files import write_gguf

TOKENS = [1, 5, 90, 33, 7, 7, 61, 12]


def load(path: Path) -> Any:
    return load_model(path, dtype=torch.float32, device="cpu")[0]


def edit(directory: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> None:
    file = directory / "model.safetensors"
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file, metadata={"format": "pt"})


@pytest.mark.parametrize(
    "changes",
    [{}, {"tie_word_embeddings": True}, {"attention_bias": True, "mlp_bias": True}],
    ids=["plain", "tied", "biased"],
)
def test_gguf_and_safetensors_of_one_model_agree(
    changes: dict[str, Any], make_checkpoint: Any, stepper: Any, tmp_path: Path
) -> None:
    directory, reference = make_checkpoint(**changes)
    write_gguf(reference, tmp_path / "model.gguf")
    expected = stepper(load(directory)).step({"a": TOKENS})["a"]
    found = stepper(load(tmp_path / "model.gguf")).step({"a": TOKENS})["a"]
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("kernels", ["auto", "off"])
def test_a_loaded_model_takes_no_memory_for_its_file(
    kernels: Any, make_checkpoint: Any, tmp_path: Path
) -> None:
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4}
    path = tmp_path / "model.gguf"
    write_gguf(make_checkpoint(**sizes)[1], path, "Q8_0")
    core = build_engine(
        CoreSettings(model_path=str(path), kv_cache_memory_bytes=1 << 20, cpu_kernels=kernels)
    )
    mapped = Path("/proc/self/maps").read_text()
    del core
    assert str(path) not in mapped


def test_quantised_gguf_computes_with_the_dequantised_weights(
    make_checkpoint: Any, stepper: Any, tmp_path: Path
) -> None:
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4}
    directory, reference = make_checkpoint(**sizes)
    write_gguf(reference, tmp_path / "model.gguf", "Q8_0")
    q8 = gguf.GGMLQuantizationType.Q8_0

    def round_trip(tensors: dict[str, torch.Tensor]) -> None:
        for name, tensor in tensors.items():
            if tensor.dim() == 2:
                stored = gguf.quants.quantize(tensor.numpy(), q8)
                tensors[name] = torch.from_numpy(gguf.quants.dequantize(stored, q8))

    edit(directory, round_trip)
    expected = stepper(load(directory)).step({"a": TOKENS})["a"]
    found = stepper(load(tmp_path / "model.gguf")).step({"a": TOKENS})["a"]
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


def test_gguf_frequency_divisors_are_llama_3_scaling(
    make_checkpoint: Any, stepper: Any, tmp_path: Path
) -> None:
    rope = {"rope_type": "linear", "rope_theta": 10_000.0, "factor": 4.0}
    directory, reference = make_checkpoint(rope_parameters=rope)
    write_gguf(reference, tmp_path / "model.gguf", rope_freqs__weight=np.full(4, 4.0, np.float32))
    expected = stepper(load(directory)).step({"a": TOKENS})["a"]
    found = stepper(load(tmp_path / "model.gguf")).step({"a": TOKENS})["a"]
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    write_gguf(reference, tmp_path / "wrong.gguf", rope_freqs__weight=np.ones(3, np.float32))
    with pytest.raises(ModelFileError, match=r"3 divisors do not fit 4 frequencies"):
        load(tmp_path / "wrong.gguf")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_checkpoints_load(dtype: torch.dtype, make_checkpoint: Any) -> None:
    directory, reference = make_checkpoint(dtype=dtype)
    model = load(directory)
    assert model.embedding.weight.dtype == torch.float32
    assert torch.equal(
        model.embedding.weight, reference.model.embed_tokens.weight.to(dtype).float()
    )


def test_shards_load_as_one(make_checkpoint: Any, stepper: Any) -> None:
    directory, reference = make_checkpoint(max_shard_size="20KB")
    assert len(list(directory.glob("*.safetensors"))) > 2
    with torch.no_grad():
        expected = reference(torch.tensor([TOKENS])).logits[0]
    found = stepper(load(directory)).step({"a": TOKENS})["a"]
    torch.testing.assert_close(found, expected, atol=2e-4, rtol=1e-4)


def test_a_missing_shard_is_an_error_that_names_it(make_checkpoint: Any) -> None:
    directory, _ = make_checkpoint(max_shard_size="20KB")
    shard = min(directory.glob("*.safetensors"))
    shard.unlink()
    with pytest.raises(ModelFileError, match=shard.name):
        load(directory)


@pytest.mark.parametrize("name", ["../../secret.safetensors", "/etc/passwd", 7, "weights.bin"])
def test_an_index_cannot_point_outside_its_directory(name: Any, make_checkpoint: Any) -> None:
    directory, _ = make_checkpoint()
    index = {"weight_map": {"lm_head.weight": name}}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ModelFileError, match="no shard's name"):
        load(directory)


def test_an_index_that_is_wrong_about_a_tensor_is_refused(make_checkpoint: Any) -> None:
    directory, _ = make_checkpoint()
    weights = {"model.norm.weight": "model.safetensors", "lm_head.weight": "model.safetensors"}
    weights["model.layers.9.mlp.up_proj.weight"] = "model.safetensors"
    index = directory / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": weights}))
    with pytest.raises(ModelFileError, match=r"model\.layers\.9\.mlp\.up_proj\.weight"):
        load(directory)


def test_missing_extra_and_misshaped_tensors_are_refused_by_name(make_checkpoint: Any) -> None:
    directory, _ = make_checkpoint()
    edit(directory, lambda tensors: tensors.update(surprise=torch.zeros(1)))
    with pytest.raises(ModelFileError, match="has tensors surprise, which"):
        load(directory)
    edit(directory, lambda tensors: tensors.pop("surprise"))
    name = "model.layers.1.self_attn.q_proj.weight"
    edit(directory, lambda tensors: tensors.update({name: torch.zeros(48, 47)}))
    with pytest.raises(ModelFileError, match=rf"{name}.*\[48, 47\], not \[48, 48\]"):
        load(directory)
    edit(directory, lambda tensors: tensors.pop(name))
    with pytest.raises(ModelFileError, match=r"lacks tensors layers\.1\.attention\.q\.weight"):
        load(directory)


def test_a_bias_that_the_configuration_does_not_have_is_refused(make_checkpoint: Any) -> None:
    directory, _ = make_checkpoint()
    name = "model.layers.0.self_attn.q_proj.bias"
    edit(directory, lambda tensors: tensors.update({name: torch.ones(48)}))
    with pytest.raises(ModelFileError, match=name):
        load(directory)


def test_a_bias_of_zeros_is_none(make_checkpoint: Any, stepper: Any) -> None:
    directory, _ = make_checkpoint()
    expected = stepper(load(directory)).step({"a": TOKENS})["a"]
    name = "model.layers.0.self_attn.q_proj.bias"
    edit(directory, lambda tensors: tensors.update({name: torch.zeros(48)}))
    assert torch.equal(stepper(load(directory)).step({"a": TOKENS})["a"], expected)


def test_a_tied_checkpoint_may_repeat_its_head(make_checkpoint: Any) -> None:
    directory, _ = make_checkpoint(tie_word_embeddings=True)
    head = "lm_head.weight"
    edit(
        directory,
        lambda tensors: tensors.update({head: tensors["model.embed_tokens.weight"].clone()}),
    )
    assert load(directory).head is None


def test_integer_tensors_are_refused(make_checkpoint: Any) -> None:
    directory, _ = make_checkpoint()
    name = "model.norm.weight"
    edit(directory, lambda tensors: tensors.update({name: torch.zeros(48, dtype=torch.int32)}))
    with pytest.raises(ModelFileError, match=rf"{name}.*is stored as I32"):
        load(directory)


def test_pickled_weights_are_never_loaded(make_checkpoint: Any) -> None:
    directory, _ = make_checkpoint()
    (directory / "model.safetensors").rename(directory / "pytorch_model.bin")
    with pytest.raises(ModelFileError, match=r"pytorch_model\.bin.*run code.*safetensors"):
        load(directory)


def test_a_directory_without_weights_is_refused(make_checkpoint: Any) -> None:
    directory, _ = make_checkpoint()
    (directory / "model.safetensors").unlink()
    with pytest.raises(ModelFileError, match="has neither"):
        load(directory)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"architectures": ["BloomForCausalLM"]}, "'BloomForCausalLM' is not supported"),
        ({"architectures": None}, "names no architecture"),
        ({"hidden_size": "48"}, "hidden_size: '48' is not an integer"),
        ({"num_hidden_layers": None}, "num_hidden_layers: is missing"),
        ({"num_hidden_layers": 10**9}, "is not between 1 and"),
        ({"num_hidden_layers": 4000}, "claims 4000 layers but has"),
        ({"num_attention_heads": 0}, "heads: 0 is not between"),
        (
            {"hidden_size": 2**22, "num_attention_heads": 2**14, "head_dim": 2**12},
            r"\[97, 48\], not",
        ),
        ({"num_key_value_heads": 5}, "6 heads do not divide into 5"),
        ({"vocab_size": 2**24}, r"\[97, 48\], not \[16777216, 48\]"),
        ({"rms_norm_eps": float("nan")}, "rms_norm_eps: is not a finite number"),
        ({"rope_parameters": {"rope_type": "spiral"}}, "'spiral' is not supported"),
        ({"rope_parameters": {"rope_type": "linear"}}, "factor: is missing"),
        (
            {"rope_parameters": {"rope_type": "linear", "factor": 10**400}},
            "factor: is not a finite",
        ),
        ({"rope_parameters": {"rope_type": "yarn", "factor": 0}}, "are positive numbers"),
        ({"rope_parameters": {"rope_theta": 1}}, "gives no frequencies"),
        ({"rope_parameters": [1]}, "rope_parameters: is not a table"),
        ({"eos_token_id": "two"}, "eos_token_id: 'two' is not a token id"),
        ({"tie_word_embeddings": "yes"}, "tie_word_embeddings: 'yes' is not true or false"),
    ],
)
def test_a_configuration_that_cannot_be_is_refused_by_key(
    change: dict[str, Any], message: str, make_checkpoint: Any
) -> None:
    directory, _ = make_checkpoint()
    (directory / "generation_config.json").unlink()
    path = directory / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    with pytest.raises(ModelFileError, match=message):
        load(directory)


def test_older_rope_settings_are_understood(make_checkpoint: Any, stepper: Any) -> None:
    rope = {"rope_type": "linear", "rope_theta": 777.0, "factor": 2.0}
    directory, _ = make_checkpoint(rope_parameters=rope)
    expected = stepper(load(directory)).step({"a": TOKENS})["a"]
    path = directory / "config.json"
    config = json.loads(path.read_text())
    del config["rope_parameters"]
    config |= {"rope_theta": 777.0, "rope_scaling": {"type": "linear", "factor": 2.0}}
    path.write_text(json.dumps(config))
    assert torch.equal(stepper(load(directory)).step({"a": TOKENS})["a"], expected)


def test_a_truncated_gguf_model_is_refused(make_checkpoint: Any, tmp_path: Path) -> None:
    _, reference = make_checkpoint()
    path = tmp_path / "model.gguf"
    write_gguf(reference, path)
    whole = path.read_bytes()
    for part in (0.05, 0.5, 0.99):
        path.write_bytes(whole[: int(len(whole) * part)])
        with pytest.raises(ModelFileError, match=r"model\.gguf"):
            load(path)


def test_a_storage_type_without_a_dequantiser_is_refused_by_name(
    make_checkpoint: Any, tmp_path: Path
) -> None:
    _, reference = make_checkpoint(hidden_size=96, intermediate_size=96, num_attention_heads=4)
    path = tmp_path / "model.gguf"
    write_gguf(reference, path, "Q4_0")
    content = bytearray(path.read_bytes())
    name = b"blk.0.attn_q.weight"
    at = content.index(name) + len(name) + 4 + 2 * 8
    assert content[at : at + 4] == struct.pack("<I", 2)
    content[at : at + 4] = struct.pack("<I", 39)  # MXFP4, whose blocks are smaller
    path.write_bytes(content)
    with pytest.raises(ModelFileError, match=r"blk\.0\.attn_q\.weight.*is stored as MXFP4"):
        load(path)


@settings(
    max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(data=st.data())
def test_mutated_checkpoints_load_or_are_refused_and_nothing_else(
    data: st.DataObject, make_checkpoint: Any, tmp_path: Path
) -> None:
    directory = tmp_path / "model"
    files = sorted(tmp_path.glob("saved.*"))
    if not files:
        _, reference = make_checkpoint(num_hidden_layers=1)
        write_gguf(reference, tmp_path / "saved.gguf")
        (tmp_path / "saved.safetensors").write_bytes((directory / "model.safetensors").read_bytes())
        (tmp_path / "saved.json").write_bytes((directory / "config.json").read_bytes())
        files = sorted(tmp_path.glob("saved.*"))
    original = data.draw(st.sampled_from(files))
    content = bytearray(original.read_bytes())
    for _ in range(data.draw(st.integers(1, 6))):
        at = data.draw(st.integers(0, min(len(content), 4096) - 1))
        content[at] = data.draw(st.integers(0, 255))
    content = content[: data.draw(st.one_of(st.just(len(content)), st.integers(0, len(content))))]
    target = {
        ".gguf": tmp_path / "mutated.gguf",
        ".json": directory / "config.json",
        ".safetensors": directory / "model.safetensors",
    }[original.suffix]
    target.write_bytes(content)
    with suppress(ModelFileError):
        load(target if original.suffix == ".gguf" else directory)
    if original.suffix != ".gguf":
        target.write_bytes(original.read_bytes())
