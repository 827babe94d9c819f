"""A model is described from its headers alone."""

from __future__ import annotations

import json
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.numpy import save_file

from services.runtime.modelfiles import ModelFileError
from services.runtime.modelfiles.description import describe


@pytest.fixture
def hf_directory(tmp_path: Path) -> Path:
    directory = tmp_path / "my-model"
    directory.mkdir()
    config = {
        "architectures": ["LlamaForCausalLM"],
        "max_position_embeddings": 128,
        "vocab_size": 10,
    }
    (directory / "config.json").write_text(json.dumps(config))
    (directory / "tokenizer_config.json").write_text('{"chat_template": "{{ messages }}"}')
    tensors = {"a": np.zeros((10, 4), np.float16), "b": np.zeros(4, np.float32)}
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    return directory


def test_the_demo_model_is_described(demo_model_path: Path) -> None:
    description = describe(demo_model_path)
    assert description.kind == "gguf"
    assert description.architecture == "llama"
    assert description.num_parameters == 134_515_008
    assert description.max_context_tokens == 8192
    assert description.dtype == "Q4_1"
    assert description.kept == "Q4_1 in 4 bits, Q8_0 in 8 bits"
    assert description.vocab_size == 49_152
    assert description.has_chat_template
    assert description.licence == "apache-2.0"
    assert description.size_bytes == 98_362_432


def test_a_hf_directory_is_described(hf_directory: Path) -> None:
    description = describe(hf_directory)
    assert description.kind == "hf"
    assert description.name == "my-model"
    assert description.architecture == "LlamaForCausalLM"
    assert description.num_parameters == 44
    assert description.max_context_tokens == 128
    assert description.dtype == "F16"
    assert description.kept == "bf16"
    assert description.vocab_size == 10
    assert description.has_chat_template
    assert {file.name for file in description.files} == {
        "config.json",
        "model.safetensors",
        "tokenizer_config.json",
    }


@pytest.mark.parametrize(
    ("config", "parts", "dtype", "kept"),
    [
        (
            {"quant_method": "gptq", "bits": 4, "desc_act": False},
            {"qweight": (8, 16, "i4"), "scales": (1, 16, "f2"), "qzeros": (1, 2, "i4")},
            "GPTQ 4 bits",
            "GPTQ 4 bits in 4 bits, others in bf16, a head in 8 bits",
        ),
        (
            {"quant_method": "gptq", "bits": 4, "desc_act": True},
            {"qweight": (8, 16, "i4"), "scales": (1, 16, "f2"), "g_idx": (8, 8, "i4")},
            "GPTQ 4 bits",
            "GPTQ 4 bits in order of activations rounded to 8 bits, others in bf16, a head in 8 "
            "bits",
        ),
        (
            {
                "quant_method": "compressed-tensors",
                "config_groups": {"group_0": {"weights": {"num_bits": 8}}},
            },
            {"weight": (64, 16, "i1"), "weight_scale": (64, 1, "f2")},
            "compressed-tensors 8 bits",
            "compressed-tensors 8 bits in 8 bits, others in bf16, a head in 8 bits",
        ),
        (
            {"quant_method": "fp8", "weight_block_size": [128, 128]},
            {"weight": (64, 16, "i1"), "weight_scale_inv": (1, 1, "f4")},
            "FP8 in blocks of 128x128",
            "FP8 in blocks of 128x128 rounded to 8 bits, others in bf16, a head in 8 bits",
        ),
    ],
)
def test_parameters_of_quantised_models_are_counted_and_what_becomes_of_them_is_said(
    config: dict[str, object],
    parts: dict[str, tuple[int, int, str]],
    dtype: str,
    kept: str,
    hf_directory: Path,
) -> None:
    tensors = {
        f"layer.{kind}": np.zeros((rows, columns), f"<{item}")
        for kind, (rows, columns, item) in parts.items()
    }
    tensors["embedding.weight"] = np.zeros((10, 4), np.float16)
    save_file(tensors, hf_directory / "model.safetensors")
    whole = json.loads((hf_directory / "config.json").read_text())
    text = json.dumps(whole | {"quantization_config": config})
    (hf_directory / "config.json").write_text(text)
    description = describe(hf_directory)
    assert description.num_parameters == 64 * 16 + 10 * 4
    assert description.dtype == dtype
    assert description.kept == kept


def test_a_directory_that_is_no_model_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ModelFileError, match=r"config\.json: no such file"):
        describe(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ModelFileError, match="is not JSON"):
        describe(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ModelFileError, match=r"no \.safetensors file"):
        describe(tmp_path)


@settings(
    max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(data=st.data())
def test_a_mutated_safetensors_header_is_read_or_refused(
    data: st.DataObject, hf_directory: Path
) -> None:
    file = hf_directory / "model.safetensors"
    whole = file.read_bytes()
    content = bytearray(whole)
    for _ in range(data.draw(st.integers(1, 4))):
        content[data.draw(st.integers(0, 200))] = data.draw(st.integers(0, 255))
    file.write_bytes(content[: data.draw(st.integers(0, len(content)))])
    with suppress(ModelFileError):
        describe(hf_directory)
    file.write_bytes(whole)
