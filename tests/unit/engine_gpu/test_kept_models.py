"""Whole models whose matrices are kept in few bits compute with kernels what they compute with the
references."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from services.engine.core.models.kept import KeptWeights
from services.engine.core.models.loader import open_model
from tests.fakes.decoder_families import save_model, served
from tests.unit.engine_gpu.test_models import interpreted_kernels, steps

CASES: list[tuple[str, KeptWeights]] = [
    ("qwen2, tied", "int8"),
    ("llama", "w8a8"),
    ("gemma3", "fp8"),
    ("mixtral", "int4"),
]


@pytest.mark.slow
@pytest.mark.parametrize(("case", "weights"), CASES)
def test_steps_by_kernels(case: str, weights: KeptWeights, tmp_path: Path) -> None:
    save_model(case, tmp_path, **served(case, num_hidden_layers=2, max_position_embeddings=64))
    model, _ = open_model(tmp_path).load_kept(weights, torch.bfloat16, "cpu")
    expected = steps(model, on_device=False)
    with interpreted_kernels() as chosen:
        found = steps(model, on_device=True)
    by_kernels = ("grouped_linear", "scaled_linear", "grouped_embedding")
    assert {chosen[op] for op in by_kernels} <= {"triton", "cutlass"}
    assert chosen["grouped_mixture_of_experts"] == "triton"
    off = (found - expected).square().mean(-1).sqrt() / expected.std()
    assert off.median() < 0.06
