"""Whole models compute with interpreted kernels what they compute with the references."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from torch import Tensor

from services.engine.core.kernels import OPS, LowRankPart
from services.engine.core.layers import MergedLinear
from services.engine.core.models import Model, load_model
from tests.fakes.decoder_families import save_model, served
from tests.unit.engine_models.conftest import Stepper

PROMPTS = {"one": [5, 17, 80, 3, 42, 9, 61], "two": [33, 4], "three": [11]}
CASES = {
    "llama": torch.float32,
    "qwen3": torch.float32,
    "gemma3": torch.float32,
    "phi3, half rotated": torch.float32,
    "gpt2": torch.float32,
    # Experts are multiplied in 16 bits alone.
    "mixtral": torch.bfloat16,
    "qwen3-moe": torch.float16,
}
PRECISION = {torch.float32: 5e-4, torch.float16: 2e-2, torch.bfloat16: 0.15}


@contextmanager
def interpreted_kernels() -> Iterator[dict[str, str]]:
    """Every op as a GPU computes it, by kernels in Triton; gives what was chosen of each."""
    try:
        yield {
            op.name: op.select("cuda", ("cuda",), tensors_on="cpu").implementation
            for op in OPS.values()
        }
    finally:
        for op in OPS.values():
            op.select("cpu")


def steps(model: Model, adapters: dict[str, int] | None = None, *, on_device: bool) -> Tensor:
    """The logits of a prompt's chunks and of single tokens, of sequences that are not as long."""
    stepper = Stepper(model)
    taken = [PROMPTS, {"one": [7], "two": [8, 9, 10], "three": [1]}, {"two": [3], "one": [2]}]
    parts = []
    for tokens in taken:
        batch = stepper.make_batch(tokens)
        if adapters is not None:
            slots = tuple(adapters[name] for name in tokens)
            batch = dataclasses.replace(batch, adapters=slots)
            if on_device:
                owners = torch.tensor(slots, dtype=torch.int32)
                per_token = owners.repeat_interleave(torch.tensor(batch.query_lengths))
                batch = dataclasses.replace(batch, token_adapters=per_token)
        parts.append(model(batch, stepper.cache).clone())
    return torch.cat(parts)


def small(case: str, path: Path) -> Model:
    dtype = CASES[case]
    save_model(case, path, **served(case, num_hidden_layers=2, max_position_embeddings=64))
    model, _ = load_model(path, dtype=dtype, device="cpu")
    return model


QUICK = ("llama", "mixtral")


@pytest.mark.parametrize(
    "case",
    [pytest.param(case, marks=() if case in QUICK else pytest.mark.slow) for case in CASES],
)
def test_steps_of_every_kind_of_layer(case: str, tmp_path: Path) -> None:
    model = small(case, tmp_path)
    expected = steps(model, on_device=False)
    with interpreted_kernels() as chosen:
        assert chosen["rotary_kv"] == chosen["mixture_of_experts"] == "triton"
        found = steps(model, on_device=True)
    precision = PRECISION[CASES[case]]
    torch.testing.assert_close(found, expected, atol=precision, rtol=precision)
    assert (expected.std(0) > 10 * precision).any(), "the logits say nothing"


@pytest.mark.slow
def test_adapters_of_which_the_device_is_told(tmp_path: Path) -> None:
    model = small("qwen3", tmp_path)
    model.take_adapters(max_adapters=3, max_rank=24)
    for slot, rank in ((0, 4), (2, 17)):
        parts = {}
        for path, module in model.projections().items():
            outputs, inputs = module.weight.shape
            cut = outputs // 2 if isinstance(module, MergedLinear) else 0
            parts[path] = tuple(
                LowRankPart(torch.randn(rank, inputs) * 0.1, torch.randn(last - first, rank), first)
                for first, last in ((0, cut), (cut, outputs))
                if first < last
            )
        model.set_adapter(slot, model.prepare_adapter(parts))
    adapters = {"one": 2, "two": -1, "three": 0}
    expected = steps(model, adapters, on_device=False)
    plain = steps(model, on_device=False)
    assert (plain - expected).abs().max() > 0.1
    with interpreted_kernels() as chosen:
        assert chosen["add_low_ranks"] == "triton"
        found = steps(model, adapters, on_device=True)
    torch.testing.assert_close(found, expected, atol=1e-3, rtol=1e-3)
