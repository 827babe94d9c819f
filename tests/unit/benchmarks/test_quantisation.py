"""The model that quantising is measured on computes what the file does that it came from."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from benchmarks.quantisation import readmes, write_reordered
from services.engine.core.models.loader import load_model, open_model
from services.engine.core.quantization.measuring import perplexity, torch_step
from tests.fakes.decoder_families import save_model
from tests.fakes.decoder_files import save_gguf


def test_another_order_of_dimensions_computes_the_same(tmp_path: Path) -> None:
    save_model("llama", tmp_path / "model")
    save_gguf(tmp_path / "model", "llama", tmp_path / "model.gguf")
    write_reordered(tmp_path / "model.gguf", tmp_path / "reordered")
    windows = torch.randint(0, 97, (2, 48), generator=torch.Generator().manual_seed(0)).tolist()
    expected = perplexity(torch_step(open_model(tmp_path / "model"), 48), windows)
    found = perplexity(torch_step(open_model(tmp_path / "reordered"), 48), windows)
    # But for its weights, which are in bf16.
    assert found == pytest.approx(expected, rel=0.05)
    model = load_model(tmp_path / "model", dtype=torch.float32, device="cpu")[0]
    reordered = load_model(tmp_path / "reordered", dtype=torch.float32, device="cpu")[0]
    for (name, own), other in zip(model.named_parameters(), reordered.parameters(), strict=True):
        assert not torch.allclose(own, other, rtol=0.01), name
        assert torch.allclose(own.flatten().sort()[0], other.flatten().sort()[0], rtol=0.01), name


def test_there_is_a_text_that_rounding_did_not_learn_from() -> None:
    assert len(readmes()) > 500_000
