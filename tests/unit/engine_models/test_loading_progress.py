"""What takes longer than a moment to load says how far it is."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from services.engine.core.kernels.cpu.team import Team
from services.engine.core.models.loader import open_model
from services.engine.core.models.native import NativeModel
from tests.fakes.gguf_files import write_gguf
from tests.fakes.paged_step import libraries

KERNELS = libraries()


@pytest.mark.parametrize("kind", ["safetensors", "gguf"])
@pytest.mark.parametrize("native", [False, True])
def test_progress_rises_to_the_end_and_is_silent_where_it_is_quick(
    kind: str,
    native: bool,
    make_checkpoint: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    if native and not KERNELS:
        pytest.skip("no native kernels on this machine")
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4}
    path, model = make_checkpoint(**sizes)
    if kind == "gguf":
        path = tmp_path / "model.gguf"
        write_gguf(model, path, "Q8_0")

    def load() -> list[float]:
        caplog.clear()
        opened = open_model(path)
        with caplog.at_level("INFO"):
            if native:
                NativeModel(opened.skeleton, opened.checkpoint, Team(KERNELS[0], 1), "auto")
            else:
                opened.load(torch.float32, "cpu")
        return [vars(record)["progress"] for record in caplog.records if "progress" in vars(record)]

    assert load() == []
    monkeypatch.setattr("services.engine.core.weights.progress._INTERVAL_S", 0.0)
    shares = load()
    assert len(shares) > 10
    assert shares == sorted(shares)
    assert 0 < shares[0] < 0.4
    assert 0.6 < shares[-1] < 1
