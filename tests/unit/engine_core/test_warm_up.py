"""An engine computes a request of its own before it takes those of others."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from services.engine.core.errors import StartupError
from services.engine.core.settings import CoreSettings
from services.engine.core.startup import build_engine


def checkpoint(path: Path, *, factor: float = 1.0) -> Path:
    """A tiny random Llama, its last matrix multiplied by a factor."""
    config = LlamaConfig(
        vocab_size=32,
        hidden_size=64,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=256,
    )
    model = LlamaForCausalLM(config)
    with torch.no_grad():
        model.lm_head.weight *= factor
    model.save_pretrained(path)
    return path


def settings(path: Path, **fields: Any) -> CoreSettings:
    fields.setdefault("kv_cache_memory_bytes", 1 << 20)
    return CoreSettings(model_path=str(path), device="cpu", dtype="float32", **fields)


def test_a_model_that_computes_nothing_is_not_ready(tmp_path: Path) -> None:
    path = checkpoint(tmp_path, factor=float("nan"))
    with pytest.raises(StartupError, match="the model does not compute"):
        build_engine(settings(path))


@pytest.mark.parametrize(
    "limits",
    [
        {"max_context_tokens": 1},
        {"max_context_tokens": 2},
        {"max_batch_tokens": 8, "max_running_sequences": 4},
        {},
    ],
)
def test_the_warm_up_keeps_to_the_limits_and_counts_nowhere(
    tmp_path: Path, limits: dict[str, int]
) -> None:
    core, _ = build_engine(settings(checkpoint(tmp_path), **limits))
    load = core.load()
    assert (load.steps, load.prompt_tokens, load.sampled_tokens, load.used_blocks) == (0, 0, 0, 0)
    assert not core.has_work
    core.check_integrity()
