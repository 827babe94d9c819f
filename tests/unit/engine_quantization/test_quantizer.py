"""A quantised model is written whole, loads in its bits, and computes what was rounded."""

from __future__ import annotations

import json
import os
from contextlib import closing
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from services.engine.core.kernels import cpu
from services.engine.core.models import load_model
from services.engine.core.models.loader import open_model
from services.engine.core.quantization.allocation import Budget
from services.engine.core.quantization.grid import round_to_nearest
from services.engine.core.quantization.measuring import perplexity, torch_step
from services.engine.core.quantization.quantizer import REPORT, Run, Target, Texts, quantize
from services.engine.core.quantization.writing import whole_directory
from services.runtime.modelfiles import ModelFileError
from tests.fakes.decoder_families import make_model, save_model
from tests.fakes.decoder_files import save_gguf
from tests.fakes.small_llama import save_small_llama

WINDOW = 64
TARGETS: tuple[Target, ...] = get_args(Target)


def random_texts() -> Texts:
    generator = torch.Generator().manual_seed(5)
    return Texts.of(torch.randint(0, 97, (700,), generator=generator).tolist(), WINDOW)


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


@pytest.mark.proves("llama", "quantize")
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
    sizes = []
    for ratio in (10.0, 1.0001):
        budget = Budget(perplexity=ratio)
        report = quantize(llama, tmp_path / str(ratio), "mixed", random_texts(), budget=budget)
        # That of what was written, not what single layers foretell.
        assert report["results"]["quantised"]["perplexity_ratio"] <= ratio
        assert report["trials"]
        sizes.append(report["file_bytes"])
        assert ratio < 10 or set(report["layers"].values()) == {4}
    assert sizes[0] <= sizes[1]


def test_a_model_with_all_projections_in_16_bits_is_what_it_was(
    llama: Path, tmp_path: Path
) -> None:
    (tmp_path / "out").mkdir()
    with closing(Run(llama, random_texts(), tmp_path / "out", lambda *_: None)) as run:
        run.write(dict.fromkeys(run.paths, 16))
    assert "quantization_config" not in json.loads((tmp_path / "out" / "config.json").read_text())
    assert tensor_names(tmp_path / "out") == tensor_names(llama)
    assert set(widths_of(tmp_path / "out").values()) == {16}


def test_a_size_below_that_of_4_bits_is_refused_before_anything_is_done(
    llama: Path, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=r"4 bits take 0\.\d\dx"):
        quantize(llama, tmp_path / "out", "mixed", random_texts(), budget=Budget(size=0.1))
    assert os.listdir(tmp_path) == ["llama"]


FAMILIES = [
    "mistral, wide heads",
    "qwen2, tied",
    "qwen3",
    "phi3",
    "gemma2",
    "gemma3",
    "mixtral",
    "qwen3-moe, as it comes",
    "gpt2",
    "gpt2, untied",
]


DENSE = [case for case in FAMILIES if not case.startswith(("gpt2", "mixtral", "qwen3-moe"))]
# Beside the widths that all have.
WHOLE_GROUPS = {
    "qwen3-moe, as it comes": {"moe_intermediate_size": 64},
    "gpt2, untied": {"n_inner": 96},
}


@pytest.mark.proves("{case}", "quantize")
@pytest.mark.parametrize("case", FAMILIES)
def test_every_family_is_quantised_in_the_names_of_its_own_files(
    case: str, whole_groups: None, tmp_path: Path
) -> None:
    save_model(case, tmp_path / "model", **WHOLE_GROUPS.get(case, {}))
    report = quantize(tmp_path / "model", tmp_path / "out", "int8", random_texts())
    assert set(report["layers"].values()) == {8}
    widths = widths_of(tmp_path / "out")
    assert {bits for name, bits in widths.items() if "router" not in name} == {8}
    names = {name for name in tensor_names(tmp_path / "out") if not is_part(name)}
    assert names <= tensor_names(tmp_path / "model")
    model = load_model(tmp_path / "out", dtype=torch.float32, device="cpu")[0]
    original = load_model(tmp_path / "model", dtype=torch.float32, device="cpu")[0]
    for (name, found), expected in zip(
        model.named_parameters(), original.parameters(), strict=True
    ):
        assert (found - expected).abs().max() <= 0.01 * expected.abs().max(), name


@pytest.mark.parametrize("target", ["int4", "int8"])
@pytest.mark.parametrize(
    "case", [each for each in FAMILIES if not each.startswith(("gpt2", "mix", "qwen3-moe"))]
)
def test_transformers_reads_the_same_model(
    case: str, target: Target, whole_groups: None, tmp_path: Path
) -> None:
    save_model(case, tmp_path / "model")
    quantize(tmp_path / "model", tmp_path / "out", target, random_texts())
    assert_transformers_agrees(tmp_path / "out")


@pytest.mark.parametrize("target", ["int4", "int8"])
@pytest.mark.parametrize("case", ["mixtral", "qwen3-moe, as it comes"])
def test_transformers_reads_the_same_experts(
    case: str, target: Target, whole_groups: None, tmp_path: Path
) -> None:
    save_model(case, tmp_path / "model", **WHOLE_GROUPS.get(case, {}))
    quantize(tmp_path / "model", tmp_path / "out", target, random_texts())
    found = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    expected = load_model(tmp_path / "out", dtype=torch.float32, device="cpu")[0]
    for theirs, ours in zip(found.model.layers, expected.layers, strict=True):
        if not hasattr(theirs.mlp, "experts"):
            continue
        for stack, own in (("gate_up_proj", "gate_up"), ("down_proj", "down")):
            wanted = ours.get_parameter(f"feed_forward.experts.{own}").bfloat16().float()
            assert torch.equal(theirs.mlp.experts.get_parameter(stack).data, wanted)
        assert torch.equal(
            theirs.mlp.gate.weight.data, ours.get_parameter("feed_forward.router.weight")
        )


def test_experts_that_calibration_hardly_reached_are_rounded_and_named(
    whole_groups: None, tmp_path: Path
) -> None:
    model = make_model("mixtral", num_local_experts=12)
    # In the middle of all others: of eleven, two are nearly always above it.
    model.model.layers[1].mlp.gate.weight.data[7] = 0
    model.save_pretrained(tmp_path / "model")
    report = quantize(tmp_path / "model", tmp_path / "out", "int4", random_texts())
    for part in ("gate_up", "down"):
        assert 7 in report["rounded_blindly"][f"layers.1.feed_forward.experts.{part}"]
    found = load_model(tmp_path / "out", dtype=torch.float32, device="cpu")[0]
    original = load_model(tmp_path / "model", dtype=torch.float32, device="cpu")[0]
    down = "layers.1.feed_forward.experts.down"
    nearest = round_to_nearest(original.get_parameter(down)[7].detach(), 4)
    assert torch.equal(found.get_parameter(down)[7], nearest.dequantize())
    reached = set(range(12)) - set(report["rounded_blindly"][down])
    assert reached
    for index in reached:
        weight = original.get_parameter(down)[index].detach()
        assert not torch.equal(
            found.get_parameter(down)[index], round_to_nearest(weight, 4).dequantize()
        )


@pytest.mark.parametrize("case", ["mixtral", "qwen3-moe"])
def test_a_gguf_file_with_experts_becomes_the_directory_of_its_family(
    case: str, whole_groups: None, tmp_path: Path
) -> None:
    save_model(
        case, tmp_path / "model", **({"moe_intermediate_size": 64} if "qwen" in case else {})
    )
    save_gguf(tmp_path / "model", case, tmp_path / "model.gguf")
    quantize(tmp_path / "model.gguf", tmp_path / "out", "int8", random_texts())
    names = {name for name in tensor_names(tmp_path / "out") if not is_part(name)}
    assert names <= tensor_names(tmp_path / "model")
    model = load_model(tmp_path / "out", dtype=torch.float32, device="cpu")[0]
    original = load_model(tmp_path / "model", dtype=torch.float32, device="cpu")[0]
    for (name, found), expected in zip(
        model.named_parameters(), original.parameters(), strict=True
    ):
        assert (found - expected).abs().max() <= 0.01 * expected.abs().max(), name


def assert_transformers_agrees(directory: Path) -> None:
    found = AutoModelForCausalLM.from_pretrained(
        directory, dtype=torch.float32, attn_implementation="eager"
    )
    expected = torch_step(open_model(directory), WINDOW)
    ids = random_texts().evaluation[0]
    with torch.no_grad():
        loss = found(torch.tensor([ids]), labels=torch.tensor([ids])).loss
    assert perplexity(expected, [ids]) == pytest.approx(float(loss.exp()), rel=1e-3)


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
    assert_transformers_agrees(tmp_path / "out")


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


def test_what_has_no_whole_groups_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    save_model("llama", tmp_path / "model")
    with pytest.raises(ModelFileError, match="whole groups of 32"):
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


@pytest.mark.parametrize(
    ("case", "lie"),
    [
        ("llama", {"num_hidden_layers": 4000}),
        ("llama", {"num_hidden_layers": 1}),
        ("llama", {"hidden_size": 2**20}),
        ("llama", {"vocab_size": 2**30}),
        ("llama", {"quantization_config": {"quant_method": "compressed-tensors"}}),
        ("llama", {"quantization_config": []}),
        ("mixtral", {"num_local_experts": 4096}),
        ("mixtral", {"num_local_experts": 2**40}),
        ("mixtral", {"num_experts_per_tok": 6}),
        ("gpt2", {"n_inner": 2**30}),
        ("gemma2", {"head_dim": 0}),
    ],
)
def test_a_configuration_that_lies_is_refused_and_nothing_is_left(
    case: str, lie: dict[str, Any], whole_groups: None, tmp_path: Path
) -> None:
    save_model(case, tmp_path / "model")
    path = tmp_path / "model" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | lie))
    with pytest.raises(ModelFileError):
        quantize(tmp_path / "model", tmp_path / "out", "int4", random_texts())
    assert os.listdir(tmp_path) == ["model"]


def test_weights_that_are_no_numbers_are_refused_by_name(llama: Path, tmp_path: Path) -> None:
    tensors = load_file(llama / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"][3, 4] = torch.nan
    save_file(tensors, llama / "model.safetensors", metadata={"format": "pt"})
    for target in TARGETS:
        with pytest.raises(ModelFileError, match=r"model\.layers\.1\.mlp\.up_proj\.weight"):
            quantize(llama, tmp_path / "out", target, random_texts(), budget=Budget(size=0.6))
    assert os.listdir(tmp_path) == ["llama"]


def test_a_tokenizer_that_knows_more_tokens_than_the_model_is_refused(
    llama: Path, tmp_path: Path
) -> None:
    texts = Texts.of([*range(200), *range(200)], WINDOW)
    with pytest.raises(ModelFileError, match="token 199"):
        quantize(llama, tmp_path / "out", "int4", texts)
    assert os.listdir(tmp_path) == ["llama"]
