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
    assert description.vocab_size == 10
    assert description.has_chat_template
    assert {file.name for file in description.files} == {
        "config.json",
        "model.safetensors",
        "tokenizer_config.json",
    }


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
