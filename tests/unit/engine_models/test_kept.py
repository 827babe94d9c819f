"""Models on torch that keep their matrices in few bits compute with the values of these bits."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from services.engine.core.kernels import GroupedMatrix, ScaledMatrix
from services.engine.core.models.footprint import decoder_footprint
from services.engine.core.models.kept import KEPT_WEIGHTS, KeptWeights, bytes_by_precision
from services.engine.core.models.loader import load_model, open_model
from services.engine.core.models.precision import WeightChoice
from tests.fakes.decoder_families import WINDOW, save_model, served
from tests.fakes.gguf_files import write_gguf
from tests.fakes.native_steps import Sequences, text
from tests.fakes.paged_step import libraries
from tests.fakes.quantised_checkpoints import quantise_checkpoint
from tests.unit.engine_models.test_native_families import log_probabilities, round_weights
from tests.unit.engine_models.test_quantised_checkpoints import CASES as QUANTISED
from tests.unit.engine_models.test_quantised_checkpoints import WIDE

KERNELS = libraries()
FAMILIES = ["llama", "qwen2, tied", "qwen3", "gemma2", "gemma3", "phi3", "gpt2"]
MIXTURES = ["mixtral", "qwen3-moe"]
# Of these bits each matrix of a checkpoint may be found.
BITS = {"q4": "int4", "q8": "int8"}


def load(path: Path, weights: KeptWeights, dtype: torch.dtype = torch.float32) -> Any:
    return open_model(path).load_kept(weights, dtype, "cpu")[0]


def expanded(path: Path, kept: Any) -> Any:
    """The same model with matrices of floats that have the values of those that are kept."""
    plain = load_model(path, dtype=torch.float32, device="cpu")[0]
    for (_, module), (_, own) in zip(plain.named_modules(), kept.named_modules(), strict=True):
        for name, matrix in vars(own).items():
            if isinstance(matrix, GroupedMatrix | ScaledMatrix):
                getattr(module, name).data.copy_(matrix.dequantize())
    return plain


def check_near(found: Tensor, expected: Tensor, tolerance: float) -> None:
    assert float((found - expected).square().mean().sqrt() / expected.std()) < tolerance


@pytest.mark.parametrize("weights", ["int8", "int4"])
@pytest.mark.parametrize("case", FAMILIES + MIXTURES)
def test_every_family_computes_what_transformers_does_with_the_same_weights(
    case: str, weights: WeightChoice, tmp_path: Path, stepper: Any
) -> None:
    reference = save_model(case, tmp_path, **served(case))
    with torch.no_grad():
        round_weights(reference, weights)
    tokens = text(4 * WINDOW + 5)
    found = stepper(load(tmp_path, weights)).step({"a": tokens})["a"].log_softmax(-1)
    expected = log_probabilities(reference, tokens)
    torch.testing.assert_close(found, expected, atol=2e-3, rtol=2e-3)


@pytest.mark.parametrize("weights", ["fp8", "w8a8"])
@pytest.mark.parametrize("case", ["llama", "gemma3", "gpt2", "mixtral"])
def test_activations_of_eight_bits_come_close(
    case: str, weights: KeptWeights, tmp_path: Path, stepper: Any
) -> None:
    save_model(case, tmp_path, **served(case))
    kept = load(tmp_path, weights)
    tokens = text(4 * WINDOW + 5)
    found = stepper(kept).step({"a": tokens})["a"].log_softmax(-1)
    expected = stepper(expanded(tmp_path, kept)).step({"a": tokens})["a"].log_softmax(-1)
    assert not torch.equal(found, expected)
    # Of a mixture, a row now and then goes to another expert for it.
    by_row = (found - expected).square().mean(-1).sqrt() / expected.std()
    assert by_row.median() < (0.15 if weights == "fp8" else 0.04)
    assert {weights, "int8", "float32"} == set(bytes_by_precision(kept))


@pytest.mark.parametrize(("quantise", "config", "formats"), QUANTISED.values(), ids=QUANTISED)
def test_checkpoints_keep_their_precision(
    quantise: Any, config: dict[str, Any], formats: set[str], make_checkpoint: Any, stepper: Any
) -> None:
    directory, reference = make_checkpoint(**WIDE)
    quantise_checkpoint(directory, reference, quantise, config)
    kept = load(directory, "auto")
    assert set(bytes_by_precision(kept)) == {*map(BITS.__getitem__, formats), "int8", "float32"}
    tokens = text(30)
    found = stepper(kept).step({"a": tokens})["a"]
    exact = stepper(expanded(directory, kept)).step({"a": tokens})["a"]
    torch.testing.assert_close(found, exact, atol=2e-4, rtol=2e-4)
    # But for the head, and scales and zero points as halves, that is the checkpoint.
    with torch.no_grad():
        check_near(found, reference(torch.tensor([tokens])).logits[0], 0.03)
    if KERNELS:
        native = Sequences(KERNELS[0], directory).step({0: tokens})[0]
        check_near(native.log_softmax(-1), found.log_softmax(-1), 0.06)


@pytest.mark.parametrize("kind", ["Q4_0", "Q4_1", "Q5_1", "Q8_0", "Q4_K", "Q6_K", "IQ4_XS"])
def test_gguf_files_keep_their_precision(
    kind: str, make_checkpoint: Any, stepper: Any, tmp_path: Path
) -> None:
    _, reference = make_checkpoint(**WIDE | {"intermediate_size": 512})
    path = tmp_path / "model.gguf"
    write_gguf(reference, path, kind)
    kept, rounded = open_model(path).load_kept("auto", torch.float32, "cpu")
    precisions = {"int4" if kind.startswith("Q4") else "int8", "float32"}
    assert set(bytes_by_precision(kept)) == precisions
    assert bool(rounded) == (kind == "Q6_K")
    tokens = text(30)
    found = stepper(kept).step({"a": tokens})["a"]
    exact = stepper(expanded(path, kept)).step({"a": tokens})["a"]
    torch.testing.assert_close(found, exact, atol=2e-4, rtol=2e-4)
    with torch.no_grad():
        expected = reference(torch.tensor([tokens])).logits[0]
    check_near(found, expected, 0.05 if kind == "Q6_K" else 5e-3)


def test_symmetric_weights_need_no_minima(make_checkpoint: Any, tmp_path: Path) -> None:
    _, reference = make_checkpoint(**WIDE)
    write_gguf(reference, tmp_path / "model.gguf", "Q4_0")
    down = load(tmp_path / "model.gguf", "auto").layers[0].feed_forward.down.weight
    assert (down.bits, down.minima, down.group_size) == (4, None, 32)


def test_larger_groups_of_a_file_stay_large(make_checkpoint: Any) -> None:
    directory, reference = make_checkpoint(**WIDE)
    quantise, config, _ = QUANTISED["awq, groups of 64"]
    quantise_checkpoint(directory, reference, quantise, config)
    assert load(directory, "auto").layers[0].attention.qkv.weight.group_size == 64


def test_a_scale_for_each_output_is_taken_over_with_its_levels(make_checkpoint: Any) -> None:
    directory, reference = make_checkpoint(**WIDE)
    quantise, config, _ = QUANTISED["compressed int8, by output"]
    quantise_checkpoint(directory, reference, quantise, config)
    found = load(directory, "w8a8").layers[1].feed_forward.down.weight
    assert torch.equal(found.dequantize(), reference.model.layers[1].mlp.down_proj.weight)


def test_what_is_no_whole_groups_stays_in_floats(make_checkpoint: Any, stepper: Any) -> None:
    directory, reference = make_checkpoint()  # 48 and 80 inputs
    for weights in ("int4", "fp8"):
        kept = load(directory, weights)
        assert set(bytes_by_precision(kept)) == {"float32"}
    with torch.no_grad():
        expected = reference(torch.tensor([[1, 2, 3]])).logits[0]
    found = stepper(kept).step({"a": [1, 2, 3]})["a"]
    torch.testing.assert_close(found, expected, atol=2e-4, rtol=2e-4)


@pytest.mark.parametrize("case", ["llama", "qwen2, tied", "gpt2", "mixtral"])
def test_it_takes_what_is_foretold(case: str, tmp_path: Path) -> None:
    save_model(case, tmp_path, **served(case))
    for weights in KEPT_WEIGHTS:
        check_foretold(tmp_path, weights)


@pytest.mark.parametrize("kind", ["Q4_0", "Q4_1", "Q4_K", "Q8_0", "Q6_K"])
def test_gguf_files_take_what_is_foretold(kind: str, make_checkpoint: Any, tmp_path: Path) -> None:
    _, reference = make_checkpoint(**WIDE | {"intermediate_size": 512})
    write_gguf(reference, tmp_path / "model.gguf", kind)
    for weights in ("auto", "int4", "fp8"):
        check_foretold(tmp_path / "model.gguf", weights)


@pytest.mark.parametrize("name", ["awq, groups of 128", "gptq 8 bits", "compressed packed 4 bits"])
def test_quantised_checkpoints_take_what_is_foretold(name: str, make_checkpoint: Any) -> None:
    directory, reference = make_checkpoint(**WIDE)
    quantise, config, _ = QUANTISED[name]
    quantise_checkpoint(directory, reference, quantise, config)
    for weights in ("auto", "int4", "w8a8"):
        check_foretold(directory, weights)


def check_foretold(path: Path, weights: KeptWeights) -> None:
    found = decoder_footprint(
        open_model(path),
        weights,
        why_not_native="the device is a GPU",
        torch_dtype=torch.bfloat16,
        keeps_few_bits=True,
    )
    kept = bytes_by_precision(load(path, weights, torch.bfloat16))
    assert found.weight_bytes == kept


def test_adapters_are_added_to_what_is_kept(make_checkpoint: Any, stepper: Any) -> None:
    directory, _ = make_checkpoint(**WIDE)
    kept = load(directory, "int4")
    linear = kept.layers[0].attention.output
    hidden = torch.randn(3, linear.weight.shape[1])
    before = linear(hidden)

    class Adapters:
        is_idle = False

        def add(self, projected: Tensor, hidden: Tensor) -> Tensor:
            return projected + hidden.sum(-1, keepdim=True)

    linear = copy.copy(linear)
    linear.adapters = Adapters()
    torch.testing.assert_close(linear(hidden), before + hidden.sum(-1, keepdim=True))
