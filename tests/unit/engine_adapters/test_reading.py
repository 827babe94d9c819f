"""What is read of an adapter's files, and what is refused by name."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from services.engine.core.adapters.config import read_adapter_config
from services.engine.core.adapters.reading import WEIGHTS_NAME, read_adapter
from services.engine.core.adapters.targets import Targets
from services.engine.core.errors import AdapterLimitError
from services.engine.core.models.loader import open_model
from services.runtime.modelfiles import ModelFileError
from tests.fakes.adapters import ALL_LINEAR, add_adapters
from tests.fakes.decoder_families import save_model
from tests.fakes.decoder_files import save_gguf

ROOT = Path(__file__).parents[3]
FIRST = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with a small Llama, `model`, and an adapter of it, `a`."""
    path = tmp_path_factory.mktemp("adapted")
    model = save_model("llama", path / "model", num_hidden_layers=2)
    add_adapters(model, path, a={"r": 4, "target_modules": ["q_proj", "down_proj"]})
    return path


@pytest.fixture
def targets(saved: Path) -> Targets:
    return Targets.of_model(open_model(saved / "model").skeleton)


@pytest.fixture
def copy(saved: Path, tmp_path: Path) -> Callable[..., Path]:
    """A copy of the adapter with other fields in its configuration, or other tensors."""

    def make(change: Callable[[dict[str, torch.Tensor]], object] = lambda _: None, **fields: Any):
        config = json.loads((saved / "a" / "adapter_config.json").read_text()) | fields
        (tmp_path / "adapter_config.json").write_text(json.dumps(config))
        tensors = load_file(saved / "a" / WEIGHTS_NAME)
        change(tensors)
        save_file(tensors, tmp_path / WEIGHTS_NAME)
        return tmp_path

    return make


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("peft_type", "IA3"),
        ("use_dora", True),
        ("bias", "all"),
        ("lora_bias", True),
        ("modules_to_save", ["lm_head"]),
        ("trainable_token_indices", [3]),
        ("target_parameters", ["experts.gate_up_proj"]),
        ("layer_replication", [[0, 1], [0, 1]]),
        ("alora_invocation_tokens", [5]),
        ("init_lora_weights", "pissa_niter_4"),
        ("r", 0),
        ("r", "many"),
        ("lora_alpha", float("inf")),
        ("use_rslora", "yes"),
        ("target_modules", [1]),
        ("rank_pattern", {"q_proj": -1}),
        ("rank_pattern", [4]),
        ("alpha_pattern", {"(a+)+b": 1}),
        ("alpha_pattern", {"(.|.)(.|.)": 1}),
        ("alpha_pattern", {"x" * 300: 1}),
        ("alpha_pattern", {f".*{number}": 1 for number in range(20)}),
    ],
)
def test_what_is_not_supported_is_refused_by_its_name(
    copy: Callable[..., Path], name: str, value: Any
) -> None:
    directory = copy(**{name: value})
    with pytest.raises(ModelFileError, match=name) as refused:
        read_adapter_config(directory)
    assert refused.value.path == directory / "adapter_config.json"


@pytest.mark.parametrize(
    ("source", "values", "problem"),
    [
        (FIRST, torch.zeros(5, 48), "has shape"),
        (FIRST, torch.zeros(4, 40), "has shape"),
        (FIRST, torch.zeros(4, 48, dtype=torch.int32), "stored as I32"),
        (FIRST, torch.full((4, 48), float("nan")), "no finite number"),
        ("base_model.model.lm_head.lora_A.weight", torch.zeros(4, 48), "no projection"),
        ("base_model.model.model.layers.7.mlp.up_proj.lora_A.weight", torch.zeros(4, 48), "no pro"),
        ("base_model.model.model.embed_tokens.lora_embedding_A", torch.zeros(4, 97), "pairs"),
        ("base_model.model.model.norm.weight", torch.zeros(48), "pairs"),
        (FIRST.replace("_proj", "_proj.lora_magnitude_vector"), torch.zeros(4), "no projection"),
        (FIRST.replace("q_proj", "k_proj"), torch.zeros(4, 48), "has no lora_B"),
        (FIRST.removeprefix("base_model.model."), torch.zeros(4, 48), "is there as"),
    ],
)
def test_a_tensor_that_does_not_fit_is_refused_by_name_and_offset(
    copy: Callable[..., Path], targets: Targets, source: str, values: Any, problem: str
) -> None:
    directory = copy(lambda tensors: tensors.update({source: values}))
    with pytest.raises(ModelFileError, match=problem) as refused:
        read_adapter(directory, targets, max_rank=64)
    assert refused.value.path == directory / WEIGHTS_NAME
    assert refused.value.what is not None
    assert refused.value.offset is not None


def test_what_changes_the_same_outputs_twice_is_refused(tmp_path: Path) -> None:
    model = save_model("phi3", tmp_path / "model", num_hidden_layers=1)
    add_adapters(model, tmp_path, a={"r": 4, "target_modules": ["qkv_proj"]})
    tensors = load_file(tmp_path / "a" / WEIGHTS_NAME)
    for kind in "AB":
        whole = tensors[f"base_model.model.model.layers.0.self_attn.qkv_proj.lora_{kind}.weight"]
        own = whole[:48] if kind == "B" else whole
        name = f"base_model.model.model.layers.0.self_attn.q_proj.lora_{kind}.weight"
        tensors[name] = own.clone()
    save_file(tensors, tmp_path / "a" / WEIGHTS_NAME)
    targets = Targets.of_model(open_model(tmp_path / "model").skeleton)
    with pytest.raises(ModelFileError, match="changes what another tensor changes"):
        read_adapter(tmp_path / "a", targets, max_rank=64)


def test_limits_name_the_setting(saved: Path, targets: Targets) -> None:
    with pytest.raises(AdapterLimitError, match="rank 4, of at most 3") as refused:
        read_adapter(saved / "a", targets, max_rank=3)
    assert refused.value.setting == "max_adapter_rank"
    with pytest.raises(AdapterLimitError, match="bytes, and 1000 are free"):
        read_adapter(saved / "a", targets, max_rank=64, free_bytes=1000)


def test_a_pickled_adapter_and_an_empty_directory_are_refused(
    copy: Callable[..., Path], targets: Targets, tmp_path: Path
) -> None:
    directory = copy()
    (directory / WEIGHTS_NAME).rename(directory / "adapter_model.bin")
    with pytest.raises(ModelFileError, match="pickled"):
        read_adapter(directory, targets, max_rank=64)
    with pytest.raises(ModelFileError, match=r"adapter_config.json: no such file"):
        read_adapter(tmp_path / "nothing", targets, max_rank=64)


def test_experts_are_refused_by_name(tmp_path: Path) -> None:
    model = save_model("mixtral", tmp_path / "model", num_hidden_layers=1)
    add_adapters(model, tmp_path, a={"target_modules": ["q_proj", "gate"]})
    targets = Targets.of_model(open_model(tmp_path / "model").skeleton)
    with pytest.raises(ModelFileError, match=r"target_parameters: .*experts"):
        read_adapter(tmp_path / "a", targets, max_rank=64)


def test_an_adapter_fits_the_model_from_gguf_too(tmp_path: Path) -> None:
    model = save_model("llama", tmp_path / "model")
    save_gguf(tmp_path / "model", "llama", tmp_path / "model.gguf")
    add_adapters(model, tmp_path, a=ALL_LINEAR)
    found = [
        read_adapter(tmp_path / "a", Targets.of_model(open_model(path).skeleton), max_rank=64)
        for path in (tmp_path / "model", tmp_path / "model.gguf")
    ]
    assert {k: [p.first for p in v] for k, v in found[0].items()} == {
        k: [p.first for p in v] for k, v in found[1].items()
    }


def fuzz(times: int, saved: Path) -> None:
    jobs = [
        [kind, examples * times, str(saved)]
        for kind, examples in (("config", 60), ("header", 60), ("tensors", 30))
    ]
    command = [sys.executable, "-m", "tests.fakes.adapter_fuzzing", json.dumps(jobs)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-1000:] + done.stderr[-6000:]


def test_damaged_adapters_are_read_or_refused(saved: Path) -> None:
    fuzz(1, saved)


@pytest.mark.slow
def test_adapters_damaged_in_many_ways_are_read_or_refused(saved: Path) -> None:
    fuzz(40, saved)
