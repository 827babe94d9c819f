"""GPTQ, AWQ and compressed-tensors checkpoints compute with the values that they hold."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from services.engine.core.models import load_model
from services.engine.core.models.loader import open_model
from services.runtime.modelfiles import ModelFileError
from tests.fakes.native_steps import Sequences
from tests.fakes.paged_step import libraries
from tests.fakes.quantised_checkpoints import (
    awq,
    awq_config,
    compressed,
    compressed_config,
    damage,
    gptq,
    gptq_config,
    quantise_checkpoint,
)

KERNELS = libraries()
TOKENS = [1, 5, 90, 33, 7, 7, 61, 12]
WIDE = {
    "hidden_size": 256,
    "intermediate_size": 384,
    "num_attention_heads": 4,
    "num_hidden_layers": 2,
    "initializer_range": 0.1,
}

# How it was made, what config.json says, and the formats its layers are kept in.
CASES: dict[str, tuple[Any, dict[str, Any], set[str]]] = {}
for size in (32, 64, 128, -1):
    CASES[f"gptq 4 bits, groups of {size}"] = (
        partial(gptq, bits=4, group_size=size),
        gptq_config(4, size),
        {"q4"},
    )
    CASES[f"awq, groups of {size}"] = partial(awq, group_size=size), awq_config(size), {"q4"}
CASES |= {
    "gptq 4 bits, asymmetric": (
        partial(gptq, bits=4, group_size=128, symmetric=False),
        gptq_config(4, 128, sym=False),
        {"q4"},
    ),
    "gptq 4 bits, asymmetric, v2": (
        partial(gptq, bits=4, group_size=64, symmetric=False, version=2),
        gptq_config(4, 64, version=2, sym=False),
        {"q4"},
    ),
    "gptq 4 bits, in order of activations": (
        partial(gptq, bits=4, group_size=64, act_order=True),
        gptq_config(4, 64, desc_act=True),
        {"q8"},
    ),
    "gptq 8 bits": (partial(gptq, bits=8, group_size=64), gptq_config(8, 64), {"q8"}),
    "gptq 8 bits, asymmetric, in order of activations": (
        partial(gptq, bits=8, group_size=-1, symmetric=False, act_order=True),
        gptq_config(8, -1, desc_act=True),
        {"q8"},
    ),
    "compressed int8, by output": (
        partial(compressed, bits=8, group_size=-1, packed=False),
        compressed_config(8, packed=False, strategy="channel"),
        {"q8"},
    ),
    "compressed int8, in groups, asymmetric": (
        partial(compressed, bits=8, group_size=128, packed=False, symmetric=False),
        compressed_config(8, packed=False, strategy="group", group_size=128),
        {"q8"},
    ),
    "compressed packed 4 bits": (
        partial(compressed, bits=4, group_size=128, packed=True),
        compressed_config(4, packed=True, strategy="group", group_size=128),
        {"q4"},
    ),
    "compressed packed 4 bits, asymmetric": (
        partial(compressed, bits=4, group_size=32, packed=True, symmetric=False),
        compressed_config(4, packed=True, strategy="group", group_size=32),
        {"q4"},
    ),
    "compressed packed 4 bits, in order of activations": (
        partial(compressed, bits=4, group_size=64, packed=True, act_order=True),
        compressed_config(4, packed=True, strategy="group", group_size=64, actorder="group"),
        {"q8"},
    ),
    "compressed packed 8 bits": (
        partial(compressed, bits=8, group_size=-1, packed=True),
        compressed_config(8, packed=True, strategy="channel"),
        {"q8"},
    ),
}


@pytest.mark.parametrize(("quantise", "config", "formats"), CASES.values(), ids=CASES.keys())
def test_logits_are_those_of_the_dequantised_model(
    quantise: Any, config: dict[str, Any], formats: set[str], make_checkpoint: Any, stepper: Any
) -> None:
    directory, reference = make_checkpoint(**WIDE)
    quantise_checkpoint(directory, reference, quantise, config)
    with torch.no_grad():
        expected = reference(torch.tensor([TOKENS])).logits[0]
    model = load_model(directory, dtype=torch.float32, device="cpu")[0]
    found = stepper(model).step({"a": TOKENS})["a"]
    torch.testing.assert_close(found, expected, atol=2e-4, rtol=2e-4)
    if KERNELS:
        native = Sequences(KERNELS[0], directory)
        assert error(native.step({0: TOKENS})[0], expected) < 0.06
        # The head, and embeddings that are only looked up.
        assert set(native.model.weight_bytes) == formats | {"q8", "bf16"}


def error(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).square().mean().sqrt() / expected.std())


@pytest.mark.parametrize(
    ("name", "exact"),
    [
        ("gptq 4 bits, groups of 128", True),
        ("gptq 4 bits, groups of -1", True),
        ("gptq 4 bits, asymmetric", False),
        ("gptq 8 bits", True),
        ("awq, groups of 64", False),
        ("compressed int8, by output", True),
        ("compressed packed 4 bits", True),
    ],
)
def test_levels_are_kept_and_no_zero_point_is_off_by_a_hundredth_of_a_level(
    name: str, exact: bool, make_checkpoint: Any
) -> None:
    quantise, config, _ = CASES[name]
    directory, reference = make_checkpoint(**WIDE)
    quantise_checkpoint(directory, reference, quantise, config)
    checkpoint = open_model(directory).checkpoint
    grouped = checkpoint.read_grouped("layers.1.feed_forward.down.weight")
    assert grouped is not None
    written = reference.model.layers[1].mlp.down_proj.weight
    if exact:
        assert torch.equal(grouped.dequantize(), written)
    off = (grouped.dequantize() - written).view(len(written), -1, 32).abs()
    assert (off <= 0.01 * grouped.scales.float().unsqueeze(-1)).all()


def test_tools_that_write_biases_of_zeros_are_understood(make_checkpoint: Any) -> None:
    directory, reference = make_checkpoint(**WIDE)

    def with_bias(weight: Tensor) -> Any:
        parts, values = gptq(weight, 4, 128)
        return parts | {"bias": torch.zeros(weight.shape[0], dtype=torch.float16)}, values

    quantise_checkpoint(directory, reference, with_bias, gptq_config(4, 128))
    open_model(directory)


def test_an_order_of_groups_that_is_said_to_be_none_is_not_read(make_checkpoint: Any) -> None:
    directory, reference = make_checkpoint(**WIDE)

    def without_order(weight: Tensor) -> Any:
        parts, values = gptq(weight, 4, 128)
        return parts | {"g_idx": torch.zeros_like(parts["g_idx"])}, values

    quantise_checkpoint(directory, reference, without_order, gptq_config(4, 128, desc_act=False))
    found = open_model(directory).checkpoint.read("layers.1.feed_forward.down.weight")
    assert torch.equal(found, reference.model.layers[1].mlp.down_proj.weight)


def test_scales_of_activations_are_not_needed(make_checkpoint: Any) -> None:
    directory, reference = make_checkpoint(**WIDE)

    def static(weight: Tensor) -> Any:
        parts, values = compressed(weight, 8, -1, packed=False)
        return parts | {"input_scale": torch.tensor([0.1])}, values

    config = compressed_config(8, packed=False, strategy="channel")
    quantise_checkpoint(directory, reference, static, config)
    assert open_model(directory).checkpoint.unknown == []


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"quant_method": "bitsandbytes"}, "quant_method: 'bitsandbytes' is not supported, only"),
        ({"bits": 4}, "quantization_config.quant_method: is missing"),
        (gptq_config(3, 128), "quantization_config.bits: 3 is not supported"),
        (gptq_config(4, 0), "group_size: 0 is neither positive nor -1"),
        (gptq_config(4, 100), r"down_proj.qweight': 384 inputs are no whole groups of 100"),
        (gptq_config(4, 64), r"qzeros has shape \[.*\], not \["),
        (gptq_config(4, 128, checkpoint_format="marlin"), "checkpoint_format: 'marlin' is not"),
        (gptq_config(4, 128, dynamic={"a": {}}), "dynamic: precisions of single modules"),
        (gptq_config(8, 128), "192 inputs are no whole groups of 128"),
        (awq_config(128, version="gemv"), "version: 'gemv' is not supported"),
        (awq_config(128, zero_point=False), "zero_point: weights without zero points"),
        (awq_config(128), "48 inputs are no whole groups of 128"),
        (compressed_config(8, packed=False, type="float"), "weights.type: 'float' is not"),
        (compressed_config(4, packed=False), "num_bits: 4 is not supported by int-quantized"),
        (
            {"quant_method": "compressed-tensors", "format": "nvfp4-pack-quantized"},
            "'nvfp4-pack-quantized'",
        ),
        (["gptq"], "quantization_config: is not a table"),
        (None, r"lacks tensors layers\.0\.attention"),
    ],
)
def test_what_cannot_be_read_is_refused_by_field_or_tensor(
    config: Any, message: str, make_checkpoint: Any
) -> None:
    directory, reference = make_checkpoint(**WIDE)
    quantise_checkpoint(directory, reference, partial(gptq, bits=4, group_size=128), config)
    with pytest.raises(ModelFileError, match=message):
        open_model(directory)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"scales": torch.full((2, 256), float("nan"))}, "scales that are no finite numbers"),
        ({"g_idx": torch.full((256,), 7, dtype=torch.int32)}, "g_idx names groups other than 0"),
        ({"g_idx": torch.full((256,), -1, dtype=torch.int32)}, "g_idx names groups other than 0"),
        ({"scales": torch.zeros(3, 256)}, r"scales has shape \[3, 256\], not \[2, 256\]"),
        ({"scales": torch.zeros(2, 256, dtype=torch.int32)}, "scales is stored as I32"),
        ({"qzeros": None}, "has no qzeros"),
    ],
)
def test_damaged_projections_are_refused_by_tensor(
    change: dict[str, Any], message: str, make_checkpoint: Any
) -> None:
    directory, reference = make_checkpoint(**WIDE)
    quantise_checkpoint(
        directory, reference, partial(gptq, bits=4, group_size=128), gptq_config(4, 128)
    )
    prefix = "model.layers.0.self_attn.q_proj"
    damage(directory, prefix, change)
    with pytest.raises(ModelFileError, match=rf"model\.safetensors: .*{prefix}.*{message}.*byte"):
        load_model(directory, dtype=torch.float32, device="cpu")
