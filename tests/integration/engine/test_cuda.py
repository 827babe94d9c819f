"""The engine on a CUDA device: the same code, the same answers. `make test-gpu` runs it."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.gpu_synthetic import write_adapter
from services.engine.core.messages import (
    FinishReason,
    LoadAdapter,
    Sampling,
    SequenceRequest,
    Stopping,
)
from services.engine.core.settings import CoreSettings
from services.engine.core.speculation.step_cost import StepCost
from services.engine.core.startup import build_engine
from tests.fakes.small_llama import VOCAB_SIZE

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device"),
]

NEW_TOKENS = 24


def completions(
    checkpoint: Path,
    device: str,
    sampling: Sampling,
    through: tuple[str, ...] = ("",),
    **changed: Any,
) -> list[list[int]]:
    """What 24 sequences of different lengths get that share a small cache, so that chunks of
    prefills, decodes and preemptions meet in one step. through: adapters, in turn."""
    engine, _ = build_engine(
        CoreSettings(
            model_path=str(checkpoint),
            device=device,
            dtype="float32",
            kv_cache_memory_bytes=512 * 2 * 2 * 2 * 16 * 4,
            **{"max_batch_tokens": 48, "max_running_sequences": 16, **changed},
        )
    )
    engine.add(
        [
            SequenceRequest(
                number,
                [3 + (7 * number + position) % (VOCAB_SIZE - 3) for position in range(1 + number)],
                sampling,
                Stopping(max_tokens=NEW_TOKENS, ignore_eos=True),
                adapter=through[number % len(through)],
            )
            for number in range(24)
        ]
    )
    outputs: list[list[int]] = [[] for _ in range(24)]
    while engine.has_work:
        for delta in engine.step().deltas:
            outputs[delta.sequence_id] += delta.token_ids
            assert delta.finish is None or delta.finish.reason is FinishReason.LENGTH
        engine.check_integrity()
    assert engine.load().used_blocks == 0
    return outputs


def test_greedy_answers_are_those_of_the_cpu(checkpoint: Path) -> None:
    greedy = Sampling(temperature=0)
    assert completions(checkpoint, "cuda:0", greedy) == completions(checkpoint, "cpu", greedy)


def test_a_seed_gives_the_same_answer_however_prompts_are_chunked(checkpoint: Path) -> None:
    seeded = Sampling(temperature=0.9, top_p=0.95, top_k=20, min_p=0.01, seed=4)
    assert completions(checkpoint, "cuda:0", seeded) == completions(
        checkpoint, "cuda:0", seeded, max_batch_tokens=16
    )


def test_the_cache_is_sized_by_what_the_largest_step_leaves_of_the_card(checkpoint: Path) -> None:
    engine, facts = build_engine(
        CoreSettings(model_path=str(checkpoint), device="cuda:0", kv_cache_memory_fraction=0.5)
    )
    assert facts.device == "cuda:0"
    assert facts.dtype == "bfloat16"
    total = torch.cuda.mem_get_info()[1]
    assert sum(facts.memory.values()) == total
    assert 0 < facts.kv_cache_memory_bytes <= facts.memory["KV cache"]
    assert facts.memory["left free"] >= total // 2
    assert not engine.has_work


@pytest.mark.parametrize("changed", [{"cuda_graphs": "off"}, {"plan_ahead": "off"}])
def test_graphs_and_overlapping_steps_change_no_answer(
    checkpoint: Path, changed: dict[str, str]
) -> None:
    for sampling in (
        Sampling(temperature=0),
        Sampling(temperature=0.9, top_p=0.9, seed=3),
        Sampling(temperature=0, frequency_penalty=0.7, repetition_penalty=1.3),
    ):
        plain = completions(checkpoint, "cuda:0", sampling, **changed)
        assert completions(checkpoint, "cuda:0", sampling) == plain


@pytest.fixture(scope="module")
def adapters(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Where two adapters of the model are."""
    config, folder = json.loads((checkpoint / "config.json").read_text()), tmp_path_factory
    return {
        name: str(write_adapter(config, folder.mktemp(name), rank=rank, seed=rank))
        for name, rank in (("one", 4), ("two", 20))
    }


def test_through_adapters_answers_are_those_of_the_cpu(
    checkpoint: Path, adapters: dict[str, str]
) -> None:
    greedy, through = Sampling(temperature=0), ("one", "", "two")
    expected = completions(checkpoint, "cpu", greedy, through, adapters=adapters)
    assert expected != completions(checkpoint, "cpu", greedy)
    for graphs in ("auto", "off"):
        settings: dict[str, Any] = {"adapters": adapters, "cuda_graphs": graphs}
        assert completions(checkpoint, "cuda:0", greedy, through, **settings) == expected


def calls_of(engine: Any, steps: int) -> dict[str, int]:
    """How often each of CUDA's functions is called in so many steps."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        for _ in range(steps):
            engine.step()
    return {event.key: event.count for event in profile.key_averages()}


def test_steps_through_adapters_are_graphs_whenever_these_come(
    checkpoint: Path, adapters: dict[str, str]
) -> None:
    engine, _ = build_engine(
        CoreSettings(model_path=str(checkpoint), device="cuda:0", speculation="off")
    )
    engine.change_adapter(LoadAdapter(1, "one", adapters["one"]))
    while not (changes := engine.adapter_changes()):
        time.sleep(0.01)
    assert not changes[0].error_kind
    stopping = Stopping(max_tokens=200, ignore_eos=True)
    engine.add(
        [
            SequenceRequest(index, [5, 6, 7], stopping=stopping, adapter="one" * (index % 2))
            for index in range(4)
        ]
    )
    for _ in range(10):
        engine.step()
    calls = calls_of(engine, 20)
    assert calls.get("cudaGraphLaunch", 0) >= 20


@pytest.mark.parametrize("temperature", [0.0, 0.9])
def test_a_draft_model_changes_no_answer(
    checkpoint: Path, temperature: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(StepCost, "observe", lambda *_: None)  # drafts are then as long as can be
    sampling = Sampling(temperature=temperature, seed=3)
    plain = completions(checkpoint, "cuda:0", sampling, speculation="off")
    drafted = completions(checkpoint, "cuda:0", sampling, draft_model_path=str(checkpoint))
    assert drafted == plain


def test_a_draft_model_has_its_next_step_before_it_is_through_with_one(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(StepCost, "observe", lambda *_: None)
    engine, _ = build_engine(
        CoreSettings(model_path=str(checkpoint), device="cuda:0", draft_model_path=str(checkpoint))
    )
    stopping = Stopping(max_tokens=200, ignore_eos=True)
    engine.add([SequenceRequest(index, [5, 6, 7], stopping=stopping) for index in range(4)])
    for _ in range(3):
        engine.step()
    calls = calls_of(engine, 4)
    waits = {name for name in calls if "Synchronize" in name or name == "cudaMemcpy"}
    assert waits <= {"cudaEventSynchronize"}
    # Of the draft model, and one to verify.
    assert calls.get("cudaGraphLaunch", 0) > 4 * 8


def test_a_steady_decode_is_a_transfer_a_graph_and_a_transfer_back(checkpoint: Path) -> None:
    engine, _ = build_engine(
        CoreSettings(model_path=str(checkpoint), device="cuda:0", speculation="off")
    )
    stopping = Stopping(max_tokens=200, ignore_eos=True)
    greedy = Sampling(temperature=0)
    engine.add([SequenceRequest(index, [5, 6, index], greedy, stopping) for index in range(4)])
    for _ in range(10):
        engine.step()
    steps = 40
    calls = calls_of(engine, steps)
    assert calls.get("cudaGraphLaunch", 0) == steps
    assert calls.get("cudaMemcpyAsync", 0) == 2 * steps
    assert not [name for name in calls if "LaunchKernel" in name]


def test_a_steady_decode_never_waits_for_all_that_the_device_has_to_do(checkpoint: Path) -> None:
    engine, _ = build_engine(
        CoreSettings(model_path=str(checkpoint), device="cuda:0", speculation="off")
    )
    stopping = Stopping(max_tokens=200, ignore_eos=True)
    engine.add([SequenceRequest(index, [5, 6, 7], stopping=stopping) for index in range(4)])
    for _ in range(10):
        engine.step()
    steps = 40
    calls = calls_of(engine, steps)
    waits = {name: calls[name] for name in calls if "Synchronize" in name or name == "cudaMemcpy"}
    # For the tokens of the step before, while the next is queued; and for memory of transfers that
    # were over two steps ago.
    assert waits.pop("cudaEventSynchronize", 0) <= 4 * steps
    assert waits == {}
    assert calls.get("cudaGraphLaunch", 0) >= steps
