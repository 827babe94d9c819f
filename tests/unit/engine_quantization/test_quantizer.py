"""A quantised model is written whole, loads in its bits, and computes what was rounded."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from transformers import AutoModelForCausalLM

from services.engine.core.kernels import cpu, select
from services.engine.core.models import load_model
from services.engine.core.models.loader import open_model
from services.engine.core.quantization.measuring import perplexity, torch_step
from services.engine.core.quantization.quantizer import REPORT, Target, Texts, quantize
from services.engine.core.quantization.sensitivity import Budget
from services.engine.core.quantization.writing import whole_directory
from services.runtime.modelfiles import ModelFileError
from tests.fakes.decoder_families import COMMON, save_model
from tests.fakes.decoder_files import save_gguf
from tests.fakes.small_llama import save_small_llama

WINDOW = 64


def random_texts() -> Texts:
    generator = torch.Generator().manual_seed(5)
    return Texts.of(torch.randint(0, 97, (700,), generator=generator).tolist(), WINDOW)


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


@pytest.fixture
def llama(tmp_path: Path) -> Path:
    save_small_llama(tmp_path / "llama")
    return tmp_path / "llama"


def widths_of(directory: Path) -> dict[str, int]:
    checkpoint = open_model(directory).checkpoint
    found = {}
    for name, shape in checkpoint.shapes.items():
        if len(shape) == 2 and name.startswith("layers."):
            grouped = checkpoint.outline(name)
            found[name] = 16 if grouped is None else grouped.bits
    return found


@pytest.mark.parametrize(("target", "bits"), [("int8", 8), ("int4", 4)])
def test_all_layers_are_in_the_bits_that_were_asked_for(
    llama: Path, tmp_path: Path, target: Target, bits: int
) -> None:
    report = quantize(llama, tmp_path / "out", target, random_texts())
    assert set(widths_of(tmp_path / "out").values()) == {bits}
    assert json.loads((tmp_path / "out" / REPORT).read_text()) == report
    results = report["results"]
    assert results["quantised"]["bytes"] < results["bfloat16"]["bytes"]
    assert results["quantised"]["decode_tokens_per_s"] > 0
    # The report's perplexity is that of what was written.
    texts = random_texts()
    found = perplexity(torch_step(open_model(tmp_path / "out"), WINDOW), texts.evaluation)
    assert results["quantised"]["perplexity"] == pytest.approx(found, rel=0.05)


def test_mixed_gives_each_projection_its_own_bits_within_the_size(
    llama: Path, tmp_path: Path
) -> None:
    report = quantize(llama, tmp_path / "out", "mixed", random_texts(), budget=Budget(size=0.6))
    written = widths_of(tmp_path / "out")
    assert len(set(written.values())) > 1
    merged = {"q": "qkv", "k": "qkv", "v": "qkv", "gate": "gate_up", "up": "gate_up"}
    for name, bits in written.items():
        head, part, _ = name.rsplit(".", 2)
        assert report["layers"][f"{head}.{merged.get(part, part)}"] == bits
    results = report["results"]
    if cpu.active() is not None:
        assert results["quantised"]["bytes"] <= 0.6 * results["bfloat16"]["bytes"]


def test_mixed_spends_no_more_than_the_quality_takes(llama: Path, tmp_path: Path) -> None:
    sizes, ratios = [], []
    for ratio in (1.5, 1.001):
        budget = Budget(perplexity=ratio)
        report = quantize(llama, tmp_path / str(ratio), "mixed", random_texts(), budget=budget)
        assert report["foretold_perplexity_ratio"] <= ratio
        ratios.append(report["foretold_perplexity_ratio"])
        sizes.append(report["file_bytes"])
    assert sizes[0] < sizes[1]
    assert ratios[0] > ratios[1]


@pytest.mark.parametrize("case", ["qwen2", "phi3", "gemma2", "mistral, wide heads"])
def test_every_dense_family_is_quantised_in_the_names_of_its_own_files(
    case: str, whole_groups: None, tmp_path: Path
) -> None:
    save_model(case, tmp_path / "model")
    quantize(tmp_path / "model", tmp_path / "out", "int8", random_texts())
    assert set(widths_of(tmp_path / "out").values()) == {8}
    names = {name for name in tensor_names(tmp_path / "out") if not is_part(name)}
    assert names <= tensor_names(tmp_path / "model")
    model = load_model(tmp_path / "out", dtype=torch.float32, device="cpu")[0]
    original = load_model(tmp_path / "model", dtype=torch.float32, device="cpu")[0]
    for (name, found), expected in zip(
        model.named_parameters(), original.parameters(), strict=True
    ):
        assert (found - expected).abs().max() <= 0.01 * expected.abs().max(), name


def tensor_names(directory: Path) -> set[str]:
    with safe_open(directory / "model.safetensors", "pt") as file:
        return set(file.keys())


def is_part(name: str) -> bool:
    return ".weight_" in name


def test_a_gguf_file_becomes_the_directory_that_transformers_reads(
    whole_groups: None, tmp_path: Path
) -> None:
    save_model("llama", tmp_path / "model")
    save_gguf(tmp_path / "model", "llama", tmp_path / "model.gguf")
    quantize(tmp_path / "model.gguf", tmp_path / "out", "int4", random_texts())
    found = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    expected = torch_step(open_model(tmp_path / "out"), WINDOW)
    ids = random_texts().evaluation[0]
    with torch.no_grad():
        loss = found(torch.tensor([ids]), labels=torch.tensor([ids])).loss
    assert perplexity(expected, [ids]) == pytest.approx(float(loss.exp()), rel=1e-3)


def test_a_gguf_file_is_written_with_the_shape_that_it_has(
    whole_groups: None, tmp_path: Path
) -> None:
    model = save_model("qwen3", tmp_path / "model")
    save_gguf(tmp_path / "model", "qwen3", tmp_path / "model.gguf")
    quantize(tmp_path / "model.gguf", tmp_path / "out", "int8", random_texts())
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    for field in ("hidden_size", "num_key_value_heads", "head_dim", "vocab_size", "rms_norm_eps"):
        assert config[field] == pytest.approx(getattr(model.config, field))
    texts = random_texts()
    before = perplexity(torch_step(open_model(tmp_path / "model"), WINDOW), texts.evaluation)
    after = perplexity(torch_step(open_model(tmp_path / "out"), WINDOW), texts.evaluation)
    assert after == pytest.approx(before, rel=0.15)


@pytest.mark.parametrize(
    ("case", "says"),
    [
        ("mixtral", "mixture of experts"),
        ("gpt2", "column by column"),
        ("llama", "whole groups of 32"),
    ],
)
def test_what_cannot_be_written_is_refused_before_anything_is(
    case: str, says: str, tmp_path: Path
) -> None:
    save_model(case, tmp_path / "model")
    with pytest.raises(ModelFileError, match=says):
        quantize(tmp_path / "model", tmp_path / "out", "int8", random_texts())
    assert os.listdir(tmp_path) == ["model"]


def test_a_quantised_model_is_not_quantised_again(llama: Path, tmp_path: Path) -> None:
    quantize(llama, tmp_path / "out", "int8", random_texts())
    with pytest.raises(ModelFileError, match="quantised already"):
        quantize(tmp_path / "out", tmp_path / "again", "int4", random_texts())


@pytest.mark.parametrize("failure", [KeyboardInterrupt, OSError, ValueError])
def test_an_interrupted_run_leaves_nothing(
    llama: Path, tmp_path: Path, failure: type[BaseException]
) -> None:
    def progress(doing: str, done: int, total: int) -> None:
        if doing == "rounding layers" and done == 1:
            raise failure

    with pytest.raises(failure):
        quantize(llama, tmp_path / "out", "int4", random_texts(), progress=progress)
    assert os.listdir(tmp_path) == ["llama"]


def test_what_is_there_already_is_left_alone(llama: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    with pytest.raises(FileExistsError), whole_directory(tmp_path / "out"):
        pass
    assert list((tmp_path / "out").iterdir()) == []


def test_text_for_evaluation_is_not_learned_from() -> None:
    texts = Texts.of(list(range(20_000)), 8192)
    learned = set(texts.calibration.flatten().tolist())
    assert not learned.intersection(*texts.evaluation)
    assert texts.calibration.shape == (16, 512)
    with pytest.raises(ValueError, match="too short"):
        Texts.of(list(range(1000)), 8192)


def test_shards_are_listed_in_an_index(
    llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("services.engine.core.quantization.writing._SHARD_BYTES", 30_000)
    quantize(llama, tmp_path / "out", "int8", random_texts())
    index: dict[str, Any] = json.loads(
        (tmp_path / "out" / "model.safetensors.index.json").read_text()
    )
    files = {path.name for path in (tmp_path / "out").glob("*.safetensors")}
    assert len(files) > 1
    assert set(index["weight_map"].values()) == files
    assert set(widths_of(tmp_path / "out").values()) == {8}
