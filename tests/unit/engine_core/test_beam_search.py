"""Beam search finds what `transformers` finds, whatever else the engine does meanwhile."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from services.engine.core.engine import EngineCore
from services.engine.core.errors import DrainingError, NeverFitsError
from services.engine.core.messages import (
    Delta,
    FinishReason,
    Sampling,
    SequenceRequest,
    Stopping,
)
from services.engine.core.model_config import SparseAttention
from services.engine.core.settings import CoreSettings
from services.engine.core.startup import build_engine
from tests.fakes.engines import make_engine, reference_output
from tests.fakes.hash_model import RAISING_TOKEN_ID, Windows

VOCAB_SIZE = 60
EOS_TOKEN_ID = 2
PADDING = 1
PROMPTS = ([7, 3, 9, 12, 55] * 5, [4, 5, 6], [11])


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model that is unsure of itself, and likes to end."""
    path = tmp_path_factory.mktemp("llama")
    torch.manual_seed(3)
    config = LlamaConfig(
        vocab_size=VOCAB_SIZE,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        initializer_range=0.2,
        eos_token_id=EOS_TOKEN_ID,
    )
    model = LlamaForCausalLM(config).float()
    with torch.no_grad():
        model.lm_head.weight[EOS_TOKEN_ID] *= 2.5
    model.save_pretrained(path)
    return path


@pytest.fixture
def engine(checkpoint: Path) -> Iterator[Any]:
    before = torch.get_num_threads()

    def build(num_blocks: int = 256, **fields: Any) -> EngineCore:
        core, _ = build_engine(
            CoreSettings(
                model_path=str(checkpoint),
                device="cpu",
                threads=1,
                dtype="float32",
                cpu_kernels="off",
                max_context_tokens=128,
                kv_cache_memory_bytes=num_blocks * 2 * 2 * 16 * 32 * 4,
                **fields,
            )
        )
        assert isinstance(core, EngineCore)
        return core

    yield build
    torch.set_num_threads(before)


def search(
    first_id: int, prompt: list[int], width: int, n: int = 1, max_tokens: int = 12, **more: Any
) -> list[SequenceRequest]:
    stopping = {
        name: more.pop(name)
        for name in ("min_tokens", "stop_token_ids", "ignore_eos")
        if name in more
    }
    return [
        SequenceRequest(
            first_id + index,
            prompt,
            Sampling(beam_width=width, logprobs=0, **more),
            Stopping(max_tokens=max_tokens, **stopping),
            choice_index=index,
        )
        for index in range(n)
    ]


def run(engine: EngineCore) -> dict[int, list[Delta]]:
    deltas: dict[int, list[Delta]] = {}
    while engine.has_work:
        for delta in engine.step().deltas:
            deltas.setdefault(delta.sequence_id, []).append(delta)
        engine.check_integrity()
    return deltas


CASES = [
    (prompt, width, length_penalty, early, more)
    for prompt in PROMPTS
    for width, length_penalty, early, more in (
        (1, 1.0, False, {}),
        (3, 1.0, False, {}),
        (4, 0.0, True, {}),
        (5, 2.0, False, {"min_tokens": 4}),
        (3, -1.0, True, {"stop_token_ids": (5, 9)}),
        (4, 1.0, False, {"ignore_eos": True}),
    )
]


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"num_blocks": 20},
        {"prefix_cache": False},
        {"max_batch_tokens": 16, "max_running_sequences": 8},
    ],
    ids=["", "in little room", "no prefix cache", "in small chunks"],
)
def test_beams_and_their_scores_are_those_of_transformers(
    engine: Any, checkpoint: Path, fields: dict[str, Any]
) -> None:
    judge = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32).eval()
    core = engine(**fields)
    for number, (prompt, width, length_penalty, early, more) in enumerate(CASES):
        core.add(
            search(
                100 * number,
                prompt,
                width,
                n=width,
                length_penalty=length_penalty,
                early_stopping=early,
                **more,
            )
        )

    answers = run(core)

    assert core.load().used_blocks == 0
    for number, (prompt, width, length_penalty, early, more) in enumerate(CASES):
        ends = [*more.get("stop_token_ids", ()), *([] if "ignore_eos" in more else [EOS_TOKEN_ID])]
        judge.generation_config.eos_token_id = ends or None
        expected = judge.generate(
            torch.tensor([prompt]),
            attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
            num_beams=width,
            num_return_sequences=width,
            length_penalty=length_penalty,
            early_stopping=early,
            do_sample=False,
            max_new_tokens=12,
            min_new_tokens=more.get("min_tokens"),
            pad_token_id=PADDING,
            return_dict_in_generate=True,
            output_scores=True,
        )
        for index in range(width):
            (delta,) = answers[100 * number + index]
            wanted = expected.sequences[index, len(prompt) :].tolist()
            assert delta.token_ids == wanted[: len(delta.token_ids)], (number, index)
            assert set(wanted[len(delta.token_ids) :]) <= {PADDING}
            ended = delta.token_ids[-1] in ends
            assert delta.finish.reason is (FinishReason.STOP if ended else FinishReason.LENGTH)
            if width > 1:
                total = sum(entry.logprob for entry in delta.logprobs)
                score = total / len(delta.token_ids) ** length_penalty
                assert score == pytest.approx(float(expected.sequences_scores[index]), abs=1e-4)


def test_a_search_runs_beside_other_requests() -> None:
    core = make_engine(num_blocks=64)
    plain = SequenceRequest(1, [4, 5, 6], Sampling(seed=5), Stopping(max_tokens=9, ignore_eos=True))
    core.add(search(10, [4, 5], 3, n=2, ignore_eos=True))
    core.add([plain])
    answers = run(core)
    tokens = [token for delta in answers[1] for token in delta.token_ids]
    assert tokens == reference_output(plain, 256)
    assert [len(answers[each][0].token_ids) for each in (10, 11)] == [12, 12]
    assert set(answers) == {1, 10, 11}
    timing = answers[10][0].timing
    assert (
        timing.queued_ns <= timing.prefill_start_ns <= timing.first_token_ns <= timing.finished_ns
    )


def test_a_search_that_is_preempted_finds_the_same() -> None:
    prompt = list(range(3, 33))
    undisturbed = make_engine(num_blocks=12)
    undisturbed.add(search(10, prompt, 2, n=2, max_tokens=6, ignore_eos=True))
    expected = run(undisturbed)
    core = make_engine(num_blocks=12)
    core.add(search(10, prompt, 2, n=2, max_tokens=6, ignore_eos=True))
    core.step()
    urgent = SequenceRequest(1, prompt[::-1], Sampling(), Stopping(max_tokens=9), priority=5)
    core.add([urgent])
    answers = run(core)
    assert core.load().preemptions > 0
    for each in (10, 11):
        assert answers[each][0].token_ids == expected[each][0].token_ids
        assert answers[each][0].logprobs == expected[each][0].logprobs


def test_a_search_is_aborted_wherever_it_is() -> None:
    for steps in range(6):
        core = make_engine(num_blocks=64)
        core.add(search(10, [4, 5], 3, n=2, ignore_eos=True))
        for _ in range(steps):
            core.step()
        (first,) = core.abort([10])
        assert first.finish.reason is FinishReason.ABORTED
        assert core.has_work
        (second,) = core.abort([11, 12])
        assert second.sequence_id == 11
        assert not core.has_work
        core.check_integrity()
        assert core.load().used_blocks == 0


def test_a_search_that_has_begun_goes_on_while_the_engine_drains() -> None:
    core = make_engine(num_blocks=64)
    core.add(search(10, [4, 5], 3, ignore_eos=True))
    core.step()
    core.drain()
    with pytest.raises(DrainingError):
        core.add(search(20, [4, 5], 3))
    assert len(run(core)[10][0].token_ids) == 12


def test_a_search_fails_as_a_whole_and_alone() -> None:
    core = make_engine(num_blocks=64)
    core.add(search(10, [4, RAISING_TOKEN_ID], 3, n=2))
    core.add(search(20, [4, 5], 3, ignore_eos=True))
    answers = run(core)
    for each in (10, 11):
        (delta,) = answers[each]
        assert delta.finish.reason is FinishReason.ERROR
    assert len(answers[20][0].token_ids) == 12


def test_what_can_never_fit_is_refused() -> None:
    core = make_engine(num_blocks=16, max_waiting_sequences=4)
    with pytest.raises(NeverFitsError):
        core.add(search(10, [4, 5], 2, max_tokens=100))
    with pytest.raises(NeverFitsError):
        core.add(search(10, [4, 5], 5))
    core.add(search(10, [4, 5], 4, ignore_eos=True))
    assert len(run(core)[10][0].token_ids) == 12


@pytest.mark.parametrize("windows", [(None, 6), (9,), (SparseAttention(5, 6),)])
def test_a_search_finds_the_same_with_windows_however_blocks_are_shared(windows: Windows) -> None:
    prompt = list(range(3, 33))
    found = []
    for limits in ({"prefix_cache": False}, {"prefix_cache": True, "max_batch_tokens": 8}):
        core = make_engine(num_blocks=96, windows=windows, **limits)
        core.add(search(10, prompt, 3, n=2, max_tokens=12, ignore_eos=True))
        answers = run(core)
        found.append([answers[each][0].token_ids for each in (10, 11)])
        assert (core.load().cache_hit_tokens > 0) == limits["prefix_cache"]
        assert core.load().used_blocks == 0
    assert found[0] == found[1]
