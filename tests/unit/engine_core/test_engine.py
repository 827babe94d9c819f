"""The engine core as a whole, over a model whose outputs are known."""

from __future__ import annotations

import random

import pytest
import torch

from services.engine.core import fault_isolation
from services.engine.core.engine import EngineCore
from services.engine.core.errors import FatalEngineError
from services.engine.core.messages import (
    Delta,
    FinishReason,
    Sampling,
    SequenceRequest,
    Stopping,
    Timing,
)
from tests.fakes.engines import make_engine, reference_output
from tests.fakes.hash_model import NAN_TOKEN_ID, RAISING_TOKEN_ID

CONTEXT_TOKENS = 64


def run(engine: EngineCore) -> dict[int, list[Delta]]:
    deltas: dict[int, list[Delta]] = {}
    while engine.has_work:
        for delta in engine.step().deltas:
            deltas.setdefault(delta.sequence_id, []).append(delta)
        engine.check_integrity()
    return deltas


def request(sequence_id: int, prompt: list[int], **sampling: object) -> SequenceRequest:
    return SequenceRequest(
        sequence_id,
        prompt,
        Sampling(**sampling),  # type: ignore[arg-type]
        Stopping(max_tokens=10, ignore_eos=True),
    )


def test_poisoned_sequences_fail_alone_with_typed_errors() -> None:
    engine = make_engine(max_batch_tokens=64)
    healthy = request(1, [4, 5, 6], seed=1)
    engine.add([request(0, [1, RAISING_TOKEN_ID]), healthy, request(2, [NAN_TOKEN_ID])])
    deltas = run(engine)
    tokens = [token for delta in deltas[1] for token in delta.token_ids]
    assert tokens == reference_output(healthy, CONTEXT_TOKENS)
    for sequence_id, kind in ((0, "RuntimeError"), (2, "LogitsError")):
        (delta,) = deltas[sequence_id]
        assert delta.token_ids == []
        assert delta.finish is not None
        assert delta.finish.reason is FinishReason.ERROR
        assert delta.finish.error_kind == kind
    assert engine.load().failed_sequences == 2
    assert engine.load().used_blocks == 0


@pytest.mark.parametrize(
    "sampling",
    [
        {"logit_bias": {1 << 20: 1.0}},
        {"banned_token_ids": (1 << 20,)},
        {"allowed_token_ids": (-99,)},
    ],
)
def test_an_edit_that_breaks_fails_its_sequence_alone(sampling: dict[str, object]) -> None:
    engine = make_engine()
    healthy = request(1, [4, 5, 6], seed=1)
    engine.add([request(0, [1], **sampling), healthy])
    deltas = run(engine)
    (failed,) = deltas[0]
    assert failed.finish is not None
    assert failed.finish.reason is FinishReason.ERROR
    tokens = [token for delta in deltas[1] for token in delta.token_ids]
    assert tokens == reference_output(healthy, CONTEXT_TOKENS)


@pytest.mark.parametrize("poison", [NAN_TOKEN_ID, RAISING_TOKEN_ID])
def test_a_poisoned_sequence_leaves_nothing_that_others_could_find(poison: int) -> None:
    engine = make_engine(num_blocks=32)
    shared = list(range(3, 15))
    engine.add([request(0, [*shared, poison, *shared])])
    run(engine)
    hits = engine.load().cache_hit_tokens
    engine.add([request(1, [*shared, poison, *shared])])
    run(engine)
    assert engine.load().cache_hit_tokens == hits
    healthy = request(2, [*shared, 20, 21], seed=3)
    engine.add([healthy])
    tokens = [token for delta in run(engine)[2] for token in delta.token_ids]
    assert tokens == reference_output(healthy, 2 * CONTEXT_TOKENS)


def test_an_engine_in_which_nothing_works_any_more_gives_up(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(fault_isolation, "_HOPELESS_STEPS", 3)
    engine = make_engine(max_running_sequences=1)
    engine.add([request(number, [RAISING_TOKEN_ID]) for number in range(2)])
    run(engine)
    engine.add([request(2, [1])])
    run(engine)  # something worked: the count starts over
    engine.add([request(number, [RAISING_TOKEN_ID]) for number in range(3)])
    with pytest.raises(FatalEngineError, match="poisoned"):
        run(engine)


def test_a_broken_device_is_fatal(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = make_engine()
    engine.add([request(0, [1])])

    def fail(*_: object) -> None:
        raise torch.AcceleratorError("an illegal memory access was encountered")

    monkeypatch.setattr(engine._runner._runner, "_model", fail)
    with pytest.raises(FatalEngineError, match="the device failed"):
        engine.step()


def test_timing_facts_come_with_the_first_token_and_the_end() -> None:
    engine = make_engine()
    engine.add([request(0, [1] * 20)])
    deltas = run(engine)[0]
    with_timing = [delta for delta in deltas if delta.timing is not None]
    assert with_timing == [deltas[0], deltas[-1]]
    first, last = (delta.timing for delta in with_timing)
    assert isinstance(first, Timing)
    assert isinstance(last, Timing)
    assert first.finished_ns == 0
    assert last.queued_ns <= last.prefill_start_ns <= last.first_token_ns <= last.finished_ns
    assert last.steps == 2 + 9  # two chunks of prefill; the last of them gives the first token


def test_counts_add_up() -> None:
    engine = make_engine()
    engine.add([request(0, [1] * 20), request(1, [2] * 5)])
    run(engine)
    load = engine.load()
    assert load.prompt_tokens == 25
    assert load.sampled_tokens == 20


def test_penalties_reach_the_model_s_logits_in_a_batch() -> None:
    engine = make_engine()
    biased = request(0, [1], temperature=0.0, logit_bias={33: 100.0})
    engine.add([biased, request(1, [1], temperature=0.0)])
    deltas = run(engine)
    assert [token for delta in deltas[0] for token in delta.token_ids] == [33] * 10
    plain = [token for delta in deltas[1] for token in delta.token_ids]
    assert plain == reference_output(request(1, [1], temperature=0.0), CONTEXT_TOKENS)


def test_log_probabilities_come_with_each_token_that_asked_for_them() -> None:
    engine = make_engine()
    engine.add([request(0, [1], logprobs=2), request(1, [1])])
    deltas = run(engine)
    for delta in deltas[0]:
        assert delta.logprobs is not None
        (entry,) = delta.logprobs
        assert len(entry.top_token_ids) == 2
        assert entry.logprob <= entry.top_logprobs[0] <= 0
    assert all(delta.logprobs is None for delta in deltas[1])


def test_ids_may_be_used_again_once_their_sequences_have_ended() -> None:
    engine = make_engine(num_blocks=64)
    rng = random.Random(0)
    for _ in range(6):
        requests = [
            request(number, [rng.randrange(50) for _ in range(rng.randrange(1, 50))])
            for number in range(4)
        ]
        rng.shuffle(requests)
        engine.add(requests)
        deltas = run(engine)
        for again in requests:
            tokens = [token for delta in deltas[again.sequence_id] for token in delta.token_ids]
            assert tokens == reference_output(again, 4 * CONTEXT_TOKENS)
