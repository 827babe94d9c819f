"""Checkpoints of eight-bit floats compute with the values that they hold, and are kept as they are
where a device multiplies them."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from compressed_tensors.quantization import QuantizationArgs
from compressed_tensors.quantization.lifecycle.forward import dequantize
from safetensors.torch import load_file, save_file
from torch import Tensor

from services.engine.core.kernels import GroupedMatrix, ScaledMatrix
from services.engine.core.models import load_model
from services.engine.core.models.kept import bytes_by_precision
from services.engine.core.models.loader import open_model
from services.engine.core.parallel.checkpoint_share import CheckpointShare
from services.engine.core.parallel.layout import Layout
from services.engine.core.parallel.partition import Partition
from services.runtime.modelfiles import ModelFileError
from tests.fakes.native_steps import Sequences
from tests.fakes.paged_step import libraries
from tests.fakes.quantised_checkpoints import (
    damage,
    float_config,
    fp8,
    fp8_config,
    quantise_checkpoint,
)
from tests.unit.engine_models.test_kept import check_foretold, check_near, load
from tests.unit.engine_models.test_quantised_checkpoints import TOKENS, WIDE, error

KERNELS = libraries()
WHOLE, BY_OUTPUT = (None, None), (1, None)
ONE = torch.tensor(1.0)
# How it was made, what config.json says, and what an H100 keeps its layers in.
CASES: dict[str, tuple[Any, dict[str, Any], str]] = {
    "compressed, by matrix, static activations": (
        partial(fp8, block=WHOLE, input_scale=ONE, dtype=torch.bfloat16),
        float_config("tensor"),
        "fp8",
    ),
    "compressed, by output": (
        partial(fp8, block=BY_OUTPUT, dtype=torch.bfloat16),
        float_config("channel"),
        "fp8",
    ),
    "compressed, by output, of weights alone": (
        partial(fp8, block=BY_OUTPUT),
        float_config("channel", weight_only=True),
        "int8",
    ),
    "compressed, in groups": (
        partial(fp8, block=(1, 64)),
        float_config("group", group_size=64),
        "int8",
    ),
    "compressed, in blocks": (
        partial(fp8, block=(128, 128), dtype=torch.bfloat16),
        float_config("block", block_structure=[128, 128]),
        "int8",
    ),
    "AutoFP8, static activations": (
        partial(fp8, block=WHOLE, input_scale=ONE),
        fp8_config(None, activation_scheme="static"),
        "fp8",
    ),
    "fbgemm": (
        partial(fp8, block=BY_OUTPUT, input_scale_ub=torch.tensor([1200.0])),
        {"quant_method": "fbgemm_fp8", "activation_scale_ub": 1200.0},
        "fp8",
    ),
    "in blocks": (
        partial(fp8, block=(128, 128), scale="weight_scale_inv"),
        fp8_config([128, 128]),
        "int8",
    ),
    "in blocks, the last ones smaller": (
        partial(fp8, block=(80, 96), scale="weight_scale_inv"),
        fp8_config([80, 96]),
        "int8",
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_logits_are_those_of_the_values_that_are_stored(
    case: str, make_checkpoint: Any, stepper: Any
) -> None:
    quantise, config, kept_in = CASES[case]
    directory, reference = make_checkpoint(**WIDE)
    quantise_checkpoint(directory, reference, quantise, config)
    with torch.no_grad():
        expected = reference(torch.tensor([TOKENS])).logits[0]
    model = load_model(directory, dtype=torch.float32, device="cpu")[0]
    found = stepper(model).step({"a": TOKENS})["a"]
    torch.testing.assert_close(found, expected, atol=2e-4, rtol=2e-4)
    kept = load(directory, "auto")
    assert set(bytes_by_precision(kept)) == {kept_in, "int8", "float32"}
    by_kept = stepper(kept).step({"a": TOKENS})["a"]
    # Activations in e4m3 cost more than rounding to 8 bits does.
    check_near(by_kept, expected, 0.15 if kept_in == "fp8" else 0.03)
    if KERNELS:
        native = Sequences(KERNELS[0], directory)
        assert error(native.step({0: TOKENS})[0], expected) < 0.06
        assert set(native.model.weight_bytes) == {"q8", "bf16"}


@pytest.mark.parametrize("case", [name for name, (*_, kept) in CASES.items() if kept == "fp8"])
def test_a_matrix_that_is_kept_has_the_bytes_of_the_file(case: str, make_checkpoint: Any) -> None:
    quantise, config, _ = CASES[case]
    directory, reference = make_checkpoint(**WIDE)
    quantise_checkpoint(directory, reference, quantise, config)
    attention = reference.model.layers[1].self_attn
    merged = torch.cat([getattr(attention, f"{part}_proj").weight for part in "qkv"])
    for weights in ("auto", "fp8"):
        layer = load(directory, weights).layers[1]
        assert torch.equal(layer.attention.qkv.weight.dequantize(), merged)
        assert layer.attention.qkv.weight.elements.dtype == torch.float8_e4m3fn
    # Other choices are made as of any checkpoint.
    assert isinstance(load(directory, "int4").layers[1].attention.qkv.weight, GroupedMatrix)
    w8a8 = load(directory, "w8a8").layers[1].attention.qkv.weight
    assert isinstance(w8a8, ScaledMatrix)
    assert w8a8.elements.dtype == torch.int8


@pytest.mark.parametrize("case", ["compressed, by output", "in blocks"])
def test_what_does_not_multiply_floats_keeps_integers(case: str, make_checkpoint: Any) -> None:
    quantise, config, _ = CASES[case]
    directory, reference = make_checkpoint(**WIDE)
    quantise_checkpoint(directory, reference, quantise, config)
    opened = open_model(directory)
    kept, rounded = opened.load_kept("auto", torch.float32, "cpu", multiplies_fp8=False)
    assert set(bytes_by_precision(kept)) == {"int8", "float32"}
    assert sum(count for name, count in rounded.items() if name.startswith("FP8")) == 14


@pytest.mark.parametrize("case", CASES)
def test_it_takes_what_is_foretold(case: str, make_checkpoint: Any) -> None:
    quantise, config, _ = CASES[case]
    directory, reference = make_checkpoint(**WIDE)
    quantise_checkpoint(directory, reference, quantise, config)
    for weights in ("auto", "fp8"):
        check_foretold(directory, weights)


@pytest.mark.parametrize(
    ("strategy", "fields", "block"),
    [
        ("tensor", {}, WHOLE),
        ("channel", {}, BY_OUTPUT),
        ("group", {"group_size": 32}, (1, 32)),
        ("block", {"block_structure": [64, 48]}, (64, 48)),
    ],
)
def test_values_are_those_of_compressed_tensors(
    strategy: str, fields: dict[str, Any], block: Any, make_checkpoint: Any
) -> None:
    directory, reference = make_checkpoint(**WIDE)
    config = float_config(strategy, **fields)
    quantise_checkpoint(directory, reference, partial(fp8, block=block), config)
    stored = load_file(directory / "model.safetensors")
    name = "model.layers.0.mlp.down_proj.weight"
    arguments = QuantizationArgs(num_bits=8, type="float", strategy=strategy, **fields)
    expected = dequantize(stored[name], stored[f"{name}_scale"], args=arguments)
    checkpoint = open_model(directory).checkpoint
    assert torch.equal(checkpoint.read("layers.0.feed_forward.down.weight"), expected.float())


@pytest.mark.parametrize("case", ["compressed, by output", "fbgemm"])
def test_ranks_keep_their_parts_as_they_are(case: str, make_checkpoint: Any) -> None:
    quantise, config, _ = CASES[case]
    directory, reference = make_checkpoint(**WIDE)
    quantise_checkpoint(directory, reference, quantise, config)
    opened, layout = open_model(directory), Layout(2, 1)
    cpu, parts = torch.device("cpu"), []
    for rank in range(2):
        share = CheckpointShare(opened.checkpoint, Partition(opened.config, layout.place(rank)))
        parts.append({name: share.read_scaled(name, cpu) for name in share.shapes})
    mlp = reference.model.layers[0].mlp
    for name, whole, dim in (
        ("layers.0.feed_forward.gate.weight", mlp.gate_proj.weight, 0),
        ("layers.0.feed_forward.down.weight", mlp.down_proj.weight, 1),
    ):
        halves = [part[name] for part in parts]
        assert all(isinstance(half, ScaledMatrix) for half in halves)
        assert torch.equal(torch.cat([half.dequantize() for half in halves], dim), whole)
    assert parts[0]["norm.weight"] is None


def test_scales_of_a_cache_are_not_needed(make_checkpoint: Any) -> None:
    directory, reference = make_checkpoint(**WIDE)
    quantise_checkpoint(
        directory, reference, partial(fp8, block=BY_OUTPUT), float_config("channel")
    )
    tensors = load_file(directory / "model.safetensors")
    tensors |= {f"model.layers.0.self_attn.{kind}_scale": torch.ones(1) for kind in "kv"}
    save_file(tensors, directory / "model.safetensors")
    assert open_model(directory).checkpoint.unknown == []


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (float_config("token"), "weights.strategy: 'token' is not supported, only tensor, ch"),
        (float_config("channel", num_bits=4), "num_bits: 4 is not supported for floats"),
        (float_config("channel", type="int"), "weights.type: 'int' is not supported, only 'float'"),
        (float_config("channel", symmetric=False), "symmetric: floats with zero points"),
        (float_config("group", group_size=0), "group_size: 0 is not positive"),
        (float_config("block"), "block_structure: None is not two positive integers"),
        (float_config("tensor"), r"has scales of the shape \[256, 1\], not \[1, 1\]"),
        (fp8_config([128]), r"weight_block_size: \[128\] is not two positive integers"),
        (fp8_config([128, 0]), r"weight_block_size: \[128, 0\] is not two positive"),
        (fp8_config([128, 128]), r"has scales of the shape \[256, 1\], not \[2, 3\]"),
        (fp8_config(None, activation_scheme="none"), "activation_scheme: 'none' is not supported"),
        (fp8_config([128, 128], fmt="e5m2"), "fmt: 'e5m2' is not supported, only 'e4m3' is"),
        (None, "is stored as F8_E4M3, only F64"),
    ],
)
def test_what_cannot_be_read_is_refused_by_field_or_tensor(
    config: Any, message: str, make_checkpoint: Any
) -> None:
    directory, reference = make_checkpoint(**WIDE)
    quantise_checkpoint(directory, reference, partial(fp8, block=BY_OUTPUT), config)
    with pytest.raises(ModelFileError, match=message):
        open_model(directory)


def damaged_elements(shape: tuple[int, int]) -> Tensor:
    bytes_ = torch.zeros(shape, dtype=torch.uint8)
    bytes_[3, 5] = 0xFF
    return bytes_.view(torch.float8_e4m3fn)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"weight_scale": None}, "has no weight_scale and no weight_scale_inv"),
        ({"weight_scale": torch.ones(2)}, r"has scales of the shape \[2\], not \[256, 1\]"),
        ({"weight_scale": torch.ones(256, 1).int()}, "weight_scale is stored as I32, not F64"),
        ({"weight_scale": torch.full((256, 1), float("inf"))}, "scales that are no finite numbers"),
        ({"weight": damaged_elements((256, 256))}, "has elements that are no numbers"),
        ({"weight": torch.ones(256, 256)}, "weight are the same weights"),
        ({"weight": None}, "has no weight"),
    ],
)
def test_damaged_projections_are_refused_by_tensor(
    change: dict[str, Any], message: str, make_checkpoint: Any
) -> None:
    directory, reference = make_checkpoint(**WIDE)
    quantise_checkpoint(
        directory, reference, partial(fp8, block=BY_OUTPUT), float_config("channel")
    )
    prefix = "model.layers.0.self_attn.q_proj"
    damage(directory, prefix, change)
    with pytest.raises(ModelFileError, match=rf"model\.safetensors: .*{prefix}.*{message}.*byte"):
        load_model(directory, dtype=torch.float32, device="cpu")
