"""What an engine says when it cannot be built as configured, and what it takes when it can."""

from __future__ import annotations

import os
from pathlib import Path

import psutil
import pytest
from transformers import LlamaConfig, LlamaForCausalLM

from services.engine.core.errors import StartupError
from services.engine.core.settings import CoreSettings
from services.engine.core.startup import build_engine


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny random Llama with a long context, so that its KV cache may be as large as wanted."""
    config = LlamaConfig(
        vocab_size=32,
        hidden_size=64,
        intermediate_size=32,
        num_hidden_layers=4,
        num_attention_heads=4,
        max_position_embeddings=65536,
    )
    path = tmp_path_factory.mktemp("llama")
    LlamaForCausalLM(config).save_pretrained(path)
    return path


def settings(checkpoint: Path, **fields: object) -> CoreSettings:
    fields.setdefault("kv_cache_memory_bytes", 1 << 20)
    return CoreSettings(model_path=str(checkpoint), device="cpu", dtype="float32", **fields)


def test_a_kv_cache_larger_than_the_free_memory_is_refused_at_once(checkpoint: Path) -> None:
    wanted = 4 * psutil.virtual_memory().total
    with pytest.raises(StartupError, match=r"KV cache of \d+ bytes does not fit on cpu: \d+ bytes"):
        build_engine(settings(checkpoint, kv_cache_memory_bytes=wanted, max_running_sequences=512))


def test_a_kv_cache_of_less_than_a_block_is_refused(checkpoint: Path) -> None:
    with pytest.raises(StartupError, match="holds no block"):
        build_engine(settings(checkpoint, kv_cache_memory_bytes=100))


def test_an_unused_kv_cache_takes_no_memory(checkpoint: Path) -> None:
    before = psutil.Process().memory_info().rss
    engine, facts = build_engine(settings(checkpoint, kv_cache_memory_bytes=1 << 30))
    grown = psutil.Process().memory_info().rss - before
    assert facts.kv_cache_memory_bytes > 0.99 * (1 << 30)
    assert grown < 1 << 28
    assert not engine.has_work


@pytest.mark.parametrize("device", ["tpu", "cuda:127", "meta"])
def test_a_device_that_is_not_there_is_named(checkpoint: Path, device: str) -> None:
    with pytest.raises(StartupError, match=device):
        build_engine(CoreSettings(model_path=str(checkpoint), device=device))


@pytest.mark.parametrize(
    ("plan_ahead", "processors", "expected"),
    [("auto", 2, True), ("auto", 1, False), ("on", 1, True), ("off", 2, False)],
)
def test_steps_are_planned_ahead_where_a_processor_is_left(
    checkpoint: Path,
    monkeypatch: pytest.MonkeyPatch,
    plan_ahead: str,
    processors: int,
    expected: bool,
) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(processors)))
    engine, _ = build_engine(settings(checkpoint, plan_ahead=plan_ahead, threads=1))
    assert engine._plans_ahead == expected


def test_a_second_engine_has_as_many_threads_as_the_first(
    checkpoint: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """The first one leaves torch a single thread: its own compute the steps."""
    settings = CoreSettings(model_path=str(checkpoint), device="cpu", kv_cache_memory_bytes=1 << 20)
    said: list[list[str]] = []
    for _ in range(2):
        caplog.clear()
        with caplog.at_level("INFO", logger="services.engine.core"):
            build_engine(settings)
        said.append([line.split()[-2] for line in caplog.messages if line.endswith(" threads")])
    assert said[0]
    assert said[1] == said[0]
