"""Products of eight bits get rows from norms and gates as they take them, and no answer changes."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from unittest import mock

import pytest
import torch
from torch import Tensor

from services.engine.core.kernels import LowRankPart, RoundedRows
from services.engine.core.layers.linear import Projection
from services.engine.core.models import Model
from services.engine.core.models.kept import KeptWeights
from services.engine.core.models.loader import open_model
from tests.fakes.decoder_families import save_model, served
from tests.unit.engine_models.conftest import Stepper

PROMPTS = {"one": [5, 17, 80, 3], "two": [33, 4]}


def kept(case: str, weights: KeptWeights, path: Path) -> Model:
    save_model(case, path, **served(case, num_hidden_layers=2, max_position_embeddings=64))
    model, _ = open_model(path).load_kept(weights, torch.bfloat16, "cpu")
    return model


def logits(model: Model) -> Tensor:
    stepper = Stepper(model)
    first = model(stepper.make_batch(PROMPTS), stepper.cache).clone()
    return torch.cat((first, model(stepper.make_batch({"one": [7]}), stepper.cache)))


@contextmanager
def rounded_by_each_product() -> Iterator[None]:
    with mock.patch.object(Projection, "takes", None):
        yield


@pytest.mark.parametrize("weights", ["w8a8", "fp8"])
@pytest.mark.parametrize("case", ["llama", "gemma2", "qwen3-moe"])
def test_rows_are_rounded_to_the_same_bits_whoever_does_it(
    case: str, weights: KeptWeights, tmp_path: Path
) -> None:
    model = kept(case, weights, tmp_path)
    with rounded_by_each_product():
        expected = logits(model)
    inputs: list[type] = []
    handles = [
        module.register_forward_pre_hook(lambda _, given: inputs.append(type(given[0])))
        for path, module in model.named_modules()
        if path.endswith(("qkv", "gate_up", "down"))
    ]
    assert torch.equal(logits(model), expected)
    for handle in handles:
        handle.remove()
    assert inputs
    assert set(inputs) == {RoundedRows}


def test_a_step_through_adapters_hands_on_rows_as_they_are(tmp_path: Path) -> None:
    model = kept("llama", "w8a8", tmp_path)
    plain = logits(model)
    model.take_adapters(max_adapters=1, max_rank=4)
    outputs, inputs = model.get_submodule("layers.0.attention.output").weight.shape
    part = LowRankPart(torch.randn(4, inputs), torch.randn(outputs, 4), 0)
    model.set_adapter(0, model.prepare_adapter({"layers.0.attention.output": (part,)}))
    assert torch.equal(logits(model), plain)

    stepper = Stepper(model)
    batch = stepper.make_batch(PROMPTS)
    adapted = model(dataclasses.replace(batch, adapters=(0, -1)), stepper.cache).clone()
    through, others = adapted.split([len(PROMPTS["one"]), len(PROMPTS["two"])])
    assert not torch.equal(through[-1], plain[: len(through)][-1])
    assert torch.equal(others, plain[len(through) : len(adapted)])
