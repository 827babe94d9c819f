"""`meshserve models show`: what a model is and whether it runs here, before it is loaded."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer, models

from tests.fakes.decoder_families import CASES, WINDOW, save_model
from tests.fakes.decoder_files import IN_GGUF, save_gguf
from tests.fakes.small_encoders import save_small_encoder

TOOLS_TEMPLATE = """{% for tool in tools or [] %}{{ tool.function.name }}{% endfor %}
{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('no system') }}{% endif %}
{{ m.role }}: {{ m.content }}{% endfor %}"""


def add_tokenizer(directory: Path, template: str | None = None) -> None:
    vocabulary = {f"t{index}": index for index in range(97)}
    Tokenizer(models.WordLevel(vocabulary, "t0")).save(str(directory / "tokenizer.json"))
    if template is not None:
        (directory / "chat_template.jinja").write_text(template)


def shown(meshserve: Callable[..., Any], path: Path, *options: str) -> dict[str, Any]:
    result = meshserve("models", "show", str(path), "--json", *options)
    document: dict[str, Any] = json.loads(result.out)
    assert result.code == (0 if document["verdict"]["runs"] else 1)
    return document


def test_the_demo_model_is_shown_with_all_that_it_takes(
    meshserve: Callable[..., Any], demo_model_path: Path
) -> None:
    found = shown(meshserve, demo_model_path, "--tokens", "1000", "--concurrency", "3")
    assert found["family"] == "Llama"
    assert found["num_parameters"] == 134_515_008
    assert found["precision"]["attention"].keys() == {"Q4_1"}
    assert found["precision"]["embedding"] == {"Q8_0": 49_152 * 576}
    assert found["shape"] | {"layers": 30, "heads": 9, "kv_heads": 3} == found["shape"]
    assert found["tokenizer"] == {"kind": "byte-level-bpe", "problem": None}
    assert found["chat_template"]["roles"] == ["system", "user", "assistant", "tool"]
    assert not found["chat_template"]["tools"]
    assert found["generation"]["temperature"] == 0.2
    assert found["licence"] == "apache-2.0"
    memory = found["memory"]
    assert memory["tokens"] == 1000
    (row,) = memory["kv_cache"]
    assert row["sequences"] == 3
    if found["verdict"]["on"] == "native":
        # Keys and values of whole blocks: 30 layers, 3 heads, 64 numbers of 2 bytes.
        assert row["bytes"] == 3 * 1008 * 2 * 30 * 3 * 64 * 2
        assert memory["weights"]["bfloat16"]["bytes"] == 2 * (134_515_008 - 61 * 576)
    assert row["total_bytes"]["auto"] == row["bytes"] + memory["weights"]["auto"]["bytes"]
    assert found["verdict"]["runs"]


def test_the_table_tells_the_same(meshserve: Callable[..., Any], demo_model_path: Path) -> None:
    result = meshserve("models", "show", str(demo_model_path))
    for words in (
        "llama: Llama, decoder",
        "134.5 million, Q4_1",
        "30, 9 heads over 3 of keys and values, 64 wide",
        "system, user, assistant, tool; no tools",
        "and 64 sequences of 4,096 tokens",
        "runs on",
    ):
        assert words in result.out


@pytest.mark.parametrize("case", CASES)
def test_every_family_of_decoders_is_shown_with_its_verdict(
    meshserve: Callable[..., Any], case: str, tmp_path: Path
) -> None:
    model = save_model(case, tmp_path)
    add_tokenizer(tmp_path)
    found = shown(meshserve, tmp_path)
    assert found["role"] == "decoder"
    assert found["num_parameters"] == sum(each.numel() for each in model.parameters())
    assert found["vocab_size"] == 97
    assert found["verdict"]["runs"]
    # What plain torch runs, it says why.
    assert (found["verdict"]["reason"] is None) == (found["verdict"]["on"] == "native")
    windowed = any(window["tokens"] == WINDOW for window in found["shape"]["windows"])
    assert windowed == (getattr(model.config, "sliding_window", None) == WINDOW)


@pytest.mark.parametrize("case", ["phi3, longrope", "gemma2", "mixtral", "gpt2"])
def test_a_gguf_file_is_shown_as_the_directory_that_it_came_from(
    meshserve: Callable[..., Any], case: str, tmp_path: Path
) -> None:
    assert case in IN_GGUF
    save_model(case, tmp_path)
    save_gguf(tmp_path, case, tmp_path / "model.gguf")
    directory, file = shown(meshserve, tmp_path), shown(meshserve, tmp_path / "model.gguf")
    for key in ("family", "num_parameters", "max_context_tokens", "context", "shape", "vocab_size"):
        assert file[key] == directory[key]


def test_encoders_are_shown_without_a_kv_cache(
    meshserve: Callable[..., Any], tmp_path: Path
) -> None:
    save_small_encoder("bert that classifies", tmp_path)
    add_tokenizer(tmp_path)
    found = shown(meshserve, tmp_path)
    assert (found["role"], found["family"]) == ("encoder", "Bert")
    assert found["shape"]["labels"] == ["bad", "so-so", "good"]
    assert all(row["bytes"] == 0 for row in found["memory"]["kv_cache"])


def test_a_template_is_asked_what_it_shows(meshserve: Callable[..., Any], tmp_path: Path) -> None:
    save_model("llama", tmp_path)
    add_tokenizer(tmp_path, TOOLS_TEMPLATE)
    found = shown(meshserve, tmp_path)["chat_template"]
    assert found["source"] == "chat_template.jinja"
    assert found["roles"] == ["user", "assistant", "tool"]
    assert found["tools"]


def rename_architecture(directory: Path, name: str) -> None:
    path = directory / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"architectures": [name]}))


def cut(directory: Path) -> None:
    path = directory / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


def pickle_weights(directory: Path) -> None:
    (directory / "model.safetensors").unlink()
    torch.save({}, directory / "pytorch_model.bin")


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (lambda path: rename_architecture(path, "LlamaForCausalLLM"), "LlamaForCausalLM"),
        (lambda path: rename_architecture(path, "Qwen2_5ForCausalLM"), "Qwen2ForCausalLM"),
        (pickle_weights, "pickled"),
        (cut, "model.safetensors"),
        (lambda path: (path / "tokenizer.json").unlink(), "tokenizer.json"),
        (lambda path: (path / "config.json").write_text("{}"), "architectures"),
    ],
    ids=["misspelt", "unknown", "pickled", "truncated", "no tokenizer", "no architecture"],
)
def test_what_does_not_run_is_told_with_the_reason(
    meshserve: Callable[..., Any],
    damage: Callable[[Path], Any],
    says: str,
    tmp_path: Path,
) -> None:
    save_model("llama", tmp_path)
    add_tokenizer(tmp_path)
    damage(tmp_path)
    verdict = shown(meshserve, tmp_path)["verdict"]
    assert not verdict["runs"]
    assert says in verdict["reason"]
    result = meshserve("models", "show", str(tmp_path))
    assert "does not run here" in result.out
    assert says in result.out


def pickle_model(directory: Path) -> None:
    """The same weights, as torch.save writes them."""
    tensors = load_file(directory / "model.safetensors")
    (directory / "model.safetensors").unlink()
    torch.save(tensors, directory / "pytorch_model.bin")


def test_of_pickled_weights_all_is_told_that_needs_no_unpickling(
    meshserve: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    model = save_model("qwen3", tmp_path)
    add_tokenizer(tmp_path, TOOLS_TEMPLATE)
    plain = shown(meshserve, tmp_path)
    pickle_model(tmp_path)
    monkeypatch.setattr("torch.load", None)
    found = shown(meshserve, tmp_path)
    same = ("name", "architecture", "family", "role", "num_parameters", "shape", "context")
    for key in (*same, "max_context_tokens", "vocab_size", "tokenizer", "chat_template"):
        assert found[key] == plain[key], key
    assert found["memory"]["weights"] == plain["memory"]["weights"]
    assert found["pickled"] == {
        "files": ["pytorch_model.bin"],
        "tensors": len(list(model.state_dict())),
        "tensor_bytes": sum(each.nbytes for each in model.state_dict().values()),
    }
    assert found["size_bytes"] == (tmp_path / "pytorch_model.bin").stat().st_size
    assert not found["verdict"]["runs"]
    assert "set allow_pickled" in found["verdict"]["reason"]
    result = meshserve("models", "show", str(tmp_path))
    for words in ("million by config.json; 4.0 bytes for each", "tensors", "allow_pickled"):
        assert words in result.out


def test_pickled_weights_that_are_no_archive_tell_nothing(
    meshserve: Callable[..., Any], tmp_path: Path
) -> None:
    save_model("llama", tmp_path)
    add_tokenizer(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    (tmp_path / "model.safetensors").unlink()
    torch.save(tensors, tmp_path / "pytorch_model.bin", _use_new_zipfile_serialization=False)
    found = shown(meshserve, tmp_path)
    assert found["pickled"]["tensors"] is None
    assert found["memory"] is None
    assert "pickled" in found["verdict"]["reason"]
    assert "unless it is unpickled" in meshserve("models", "show", str(tmp_path)).out


def test_a_configuration_that_claims_more_layers_than_are_pickled_is_not_built(
    meshserve: Callable[..., Any], tmp_path: Path
) -> None:
    save_model("llama", tmp_path)
    add_tokenizer(tmp_path)
    pickle_model(tmp_path)
    path = tmp_path / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"num_hidden_layers": 4000}))
    found = shown(meshserve, tmp_path)
    assert found["num_parameters"] is None
    assert found["pickled"]["files"] == ["pytorch_model.bin"]
    assert "pickled" in found["verdict"]["reason"]


def test_a_model_of_the_settings_is_shown_as_they_have_it_served(
    meshserve: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    save_model("llama", tmp_path, max_position_embeddings=4096)
    add_tokenizer(tmp_path)
    model = {"source": str(tmp_path), "sparse_attention": {"window": 100, "global_tokens": 20}}
    monkeypatch.setenv("MESHSERVE_MODELS", json.dumps({"mine": model}))
    options = ("--tokens", "4000", "--concurrency", "1")
    plain, sparse = shown(meshserve, tmp_path, *options), shown(meshserve, Path("mine"), *options)
    assert plain["shape"]["sparse_attention"] is None
    layers = sparse["shape"]["layers"]
    seen = {"window": 100, "global_tokens": 20, "layers": layers}
    assert sparse["shape"]["sparse_attention"] == seen
    # 250 blocks hold 4,000 tokens; 2 of the beginning and 40 those of a window and a step.
    taken = [each["memory"]["kv_cache"][0]["bytes"] for each in (plain, sparse)]
    assert plain["verdict"]["on"] == sparse["verdict"]["on"] == "torch"
    assert taken[1] == taken[0] * (2 + 40) // 250
    table = meshserve("models", "show", "mine").out
    assert "with attention to 100 tokens back and the first 20" in table


def test_too_little_memory_is_told(
    meshserve: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    save_model("llama", tmp_path)
    add_tokenizer(tmp_path)
    monkeypatch.setattr("services.engine.core.fitness.free_memory_bytes", lambda device: 1000)
    verdict = shown(meshserve, tmp_path)["verdict"]
    assert not verdict["runs"]
    assert "1000 are free" in verdict["reason"]
