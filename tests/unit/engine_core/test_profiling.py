"""The step that is run to see what memory steps take is the largest that there can be."""

from __future__ import annotations

import contextlib
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import Gemma3ForCausalLM, Gemma3TextConfig, LlamaConfig, LlamaForCausalLM

from services.engine.core import profiling, token_budget
from services.engine.core.backends import load_backend
from services.engine.core.batch import ForwardBatch
from services.engine.core.gpu_memory import Readings
from services.engine.core.layer_groups import LayerGroups
from services.engine.core.messages import Sampling, SequenceRequest, Stopping
from services.engine.core.models.loader import open_model
from services.engine.core.profiling import plan_card
from services.engine.core.settings import CoreSettings
from services.engine.core.speculation import plan_drafts
from tests.fakes import engines
from tests.fakes.hash_model import hash_model
from tests.fakes.speculators import HalfRightSpeculator

CPU = torch.device("cpu")
SHAPE: dict[str, Any] = {
    "vocab_size": 50,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 200,
}
ROW_BYTES = 2 * 2 * 16 * 2 * 16 * 4


class FakeCard:
    """Its free memory holds the tokens of so many rows; a step takes nothing of it."""

    def __init__(self, rows: int) -> None:
        self._free = rows * ROW_BYTES

    def read(self) -> Readings:
        return Readings(self._free * 2, self._free, self._free, self._free)

    def reset(self) -> None:
        pass


def steps_of(
    directory: Path, monkeypatch: pytest.MonkeyPatch, *, rows: int, **fields: Any
) -> list[ForwardBatch]:
    """The steps that are run to size the cache of the model in a directory."""
    settings = CoreSettings(model_path=str(directory), device="cpu", dtype="float32", **fields)
    opened = open_model(directory)
    backend = load_backend(opened, settings, CPU, [])
    steps: list[ForwardBatch] = []
    family = type(opened.skeleton)
    forward = family.forward

    def watched(self: Any, batch: ForwardBatch, kv_cache: Any) -> Any:
        steps.append(batch)
        return forward(self, batch, kv_cache)

    monkeypatch.setattr(family, "forward", watched)
    groups = LayerGroups.of(opened.config)
    with contextlib.closing(opened.checkpoint):
        plan_card(settings, backend, opened.config, groups, ROW_BYTES, CPU, reader=FakeCard(rows))
    return steps


@pytest.fixture
def llama(tmp_path: Path) -> Path:
    LlamaForCausalLM(LlamaConfig(**SHAPE)).save_pretrained(tmp_path)
    return tmp_path


def test_prompts_fill_a_step_and_all_sequences_decode(
    llama: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO):
        prompts, decodes = steps_of(
            llama, monkeypatch, rows=1000, max_batch_tokens=512, max_running_sequences=40
        )
    assert (prompts.query_lengths, prompts.context_lengths) == ((200, 200, 112), (200, 200, 112))
    assert decodes.query_lengths == (1,) * 40
    assert decodes.context_lengths == (200,) * 40
    # Sampled from, drafted or scored: any token of such a step.
    assert len(prompts.logits_rows) == 512
    assert len(decodes.logits_rows) == 40
    assert "memory of cpu: 0.02 GiB: weights" in caplog.text


def test_a_chunk_sees_what_came_before_it(llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    prompts, _ = steps_of(
        llama, monkeypatch, rows=1000, max_batch_tokens=64, max_running_sequences=4
    )
    assert (prompts.query_lengths, prompts.context_lengths) == ((64,), (200,))


def test_sequences_see_no_more_than_the_memory_that_is_free_would_hold(
    llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    prompts, decodes = steps_of(
        llama, monkeypatch, rows=5, max_batch_tokens=64, max_running_sequences=8
    )
    assert prompts.context_lengths == (80,)
    assert decodes.context_lengths == (10,) * 8


def test_layers_with_windows_have_tables_of_their_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = Gemma3TextConfig(**{**SHAPE, "num_hidden_layers": 6}, sliding_window=32)
    Gemma3ForCausalLM(config).save_pretrained(tmp_path)
    prompts, _ = steps_of(
        tmp_path, monkeypatch, rows=1000, max_batch_tokens=64, max_running_sequences=4
    )
    assert prompts.block_tables.dim() == 3
    assert prompts.slots.shape == (prompts.block_tables.shape[0], 64)


@pytest.mark.parametrize("drafts", [False, True])
def test_no_step_wants_the_logits_of_more_rows_however_much_is_scored_and_drafted(
    drafts: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(token_budget, "MAX_SCORED_TOKENS", 24)
    monkeypatch.setattr(profiling, "MAX_SCORED_TOKENS", 24)
    for module in (plan_drafts, profiling):
        monkeypatch.setattr(module, "MAX_DRAFTED_TOKENS", 10)
    limits = {"max_batch_tokens": 400, "max_running_sequences": 6}
    most = profiling.most_rows(
        CoreSettings(model_path="", speculation="ngram" if drafts else "off", **limits)
    )
    assert most == 6 + 24
    rows: list[int] = []

    def watched(batch: ForwardBatch, kv_cache: Any) -> Any:
        rows.append(len(batch.logits_rows))
        return hash_model(batch, kv_cache)

    monkeypatch.setattr(engines, "make_hash_model", lambda windows: watched)
    core = engines.make_engine(
        num_blocks=600,
        speculator=HalfRightSpeculator(512, seed=3) if drafts else None,
        **limits,
    )
    for number in range(12):
        prompt = [3 + (number + each) % 40 for each in range(90 if number % 3 else 2)]
        sampling = Sampling(temperature=0.0, prompt_logprobs=1 if number % 3 else None)
        stopping = Stopping(max_tokens=20, ignore_eos=True)
        core.add([SequenceRequest(number, prompt, sampling, stopping)])
    scored: dict[int, int] = {}
    while core.has_work:
        for delta in core.step().deltas:
            if delta.prompt_logprobs is not None:
                scored[delta.sequence_id] = len(delta.prompt_logprobs)
    assert scored == {number: 89 for number in range(12) if number % 3}
    assert 24 < max(rows) <= most
