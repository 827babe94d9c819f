"""Answers are the same with and without speculation, token by token, whatever is asked for."""

from __future__ import annotations

from collections.abc import Iterator

import hypothesis.strategies as st
import pytest
from hypothesis import HealthCheck, given, settings

from services.engine.core.engine import EngineCore
from services.engine.core.messages import (
    Delta,
    Finish,
    FinishReason,
    Sampling,
    SequenceRequest,
    Stopping,
    TokenLogprobs,
)
from services.engine.core.sequence import Sequence
from services.engine.core.speculation.ngram import PromptLookup
from services.engine.core.speculation.speculator import NgramSpeculator, room_for_draft
from tests.fakes.engines import make_engine, reference_output
from tests.fakes.hash_model import NAN_TOKEN_ID, RAISING_TOKEN_ID, VOCAB_SIZE
from tests.fakes.speculators import HalfRightSpeculator, KnowingSpeculator

BLOCK_SIZE = 4

tokens = st.integers(0, 50)
samplings = st.builds(
    Sampling,
    temperature=st.sampled_from([0.0, 0.7, 1.3]),
    top_k=st.sampled_from([0, 5]),
    top_p=st.sampled_from([1.0, 0.9]),
    min_p=st.sampled_from([0.0, 0.1]),
    seed=st.integers(0, 2**64 - 1),
)
edited = st.builds(
    Sampling,
    temperature=st.sampled_from([0.0, 0.9]),
    seed=st.integers(0, 2**32),
    repetition_penalty=st.sampled_from([1.0, 1.5]),
    presence_penalty=st.sampled_from([0.0, 1.0]),
    frequency_penalty=st.sampled_from([0.0, 0.8]),
    logprobs=st.sampled_from([None, 0, 3]),
)
stoppings = st.builds(
    Stopping,
    max_tokens=st.integers(1, 20),
    min_tokens=st.integers(0, 6),
    ignore_eos=st.booleans(),
    stop_token_ids=st.lists(tokens, max_size=2).map(tuple),
    stop_sequences=st.lists(st.lists(tokens, min_size=1, max_size=2).map(tuple), max_size=2).map(
        tuple
    ),
)
prompts = st.lists(tokens, min_size=1, max_size=24)

Answer = tuple[list[int], list[TokenLogprobs], Finish | None]


def answers_of(engine: EngineCore, requests: list[SequenceRequest]) -> dict[int, Answer]:
    answers: dict[int, Answer] = {each.sequence_id: ([], [], None) for each in requests}

    def receive(delta: Delta) -> None:
        token_ids, logprobs, finish = answers[delta.sequence_id]
        assert finish is None
        answers[delta.sequence_id] = (
            token_ids + delta.token_ids,
            logprobs + (delta.logprobs or []),
            delta.finish,
        )

    engine.add(requests)
    while engine.has_work:
        step = engine.step()
        assert step.num_tokens <= 16
        for delta in step.deltas:
            receive(delta)
        engine.check_integrity()
    assert engine.load().used_blocks == 0
    return answers


@settings(deadline=None, max_examples=150, suppress_health_check=[HealthCheck.too_slow])
@given(
    arrivals=st.lists(st.tuples(prompts, samplings, stoppings), min_size=1, max_size=6),
    num_blocks=st.integers(12, 24),
    max_running_sequences=st.integers(1, 4),
    seed=st.integers(0, 2**32),
)
def test_drafts_right_or_wrong_change_no_answer(
    arrivals: list[tuple[list[int], Sampling, Stopping]],
    num_blocks: int,
    max_running_sequences: int,
    seed: int,
) -> None:
    context_tokens = num_blocks * BLOCK_SIZE
    requests = [
        SequenceRequest(index, prompt, sampling, stopping, choice_index=index % 2)
        for index, (prompt, sampling, stopping) in enumerate(arrivals)
    ]
    speculator = HalfRightSpeculator(context_tokens, seed)
    engine = make_engine(
        num_blocks=num_blocks,
        block_size=BLOCK_SIZE,
        max_running_sequences=max_running_sequences,
        speculator=speculator,
    )
    answers = answers_of(engine, requests)
    for request in requests:
        token_ids, _, finish = answers[request.sequence_id]
        assert token_ids == reference_output(request, context_tokens)
        assert finish is not None
        assert finish.reason in (FinishReason.STOP, FinishReason.LENGTH)
    assert not speculator.tracked


@settings(deadline=None, max_examples=60, suppress_health_check=[HealthCheck.too_slow])
@given(
    arrivals=st.lists(st.tuples(prompts, edited, stoppings), min_size=1, max_size=4),
    seed=st.integers(0, 2**32),
)
def test_penalties_bars_and_log_probabilities_are_those_of_each_position(
    arrivals: list[tuple[list[int], Sampling, Stopping]], seed: int
) -> None:
    requests = [
        SequenceRequest(index, prompt, sampling, stopping)
        for index, (prompt, sampling, stopping) in enumerate(arrivals)
    ]
    expected = answers_of(make_engine(num_blocks=48), requests)
    # Its drafts come from answers without penalties: some are right here too.
    speculator = HalfRightSpeculator(48 * BLOCK_SIZE, seed)
    assert answers_of(make_engine(num_blocks=48, speculator=speculator), requests) == expected


def test_accepted_tokens_save_steps_and_are_counted() -> None:
    prompt = [3, 4, 5, 6] * 4
    # The likeliest token is decided by the bias: the answer repeats one token.
    sampling = Sampling(temperature=0.0, logit_bias={7: 100.0})
    request = SequenceRequest(0, prompt, sampling, Stopping(max_tokens=40, ignore_eos=True))
    plain = make_engine(num_blocks=32)
    engine = make_engine(num_blocks=32, speculator=NgramSpeculator())
    assert answers_of(engine, [request]) == answers_of(plain, [request])
    load = engine.load()
    assert load.steps < plain.load().steps / 2
    assert load.sampled_tokens == 40
    assert 0 < load.accepted_draft_tokens <= load.drafted_tokens
    assert load.steps + load.accepted_draft_tokens >= 40


@pytest.mark.parametrize("poison", [NAN_TOKEN_ID, RAISING_TOKEN_ID])
def test_a_draft_that_breaks_a_step_harms_nobody(poison: int) -> None:
    class Poisoner(NgramSpeculator):
        def propose(self, sequences: list[Sequence], max_tokens: int) -> list[tuple[int, ...]]:
            return [(poison,) * min(2, room_for_draft(each), max_tokens) for each in sequences]

    requests = [
        SequenceRequest(
            index, [1, 2, index], Sampling(seed=index), Stopping(max_tokens=6, ignore_eos=True)
        )
        for index in range(2)
    ]
    engine = make_engine(speculator=Poisoner())
    assert answers_of(engine, requests) == answers_of(make_engine(), requests)
    assert engine.load().failed_sequences == 0


def test_nothing_is_kept_of_sequences_that_have_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[PromptLookup] = []
    original = PromptLookup.__init__

    def counting(self: PromptLookup) -> None:
        made.append(self)
        original(self)

    monkeypatch.setattr(PromptLookup, "__init__", counting)
    speculator = NgramSpeculator()
    engine = make_engine(num_blocks=32, speculator=speculator)
    engine.add([SequenceRequest(index, [1, 2, 1, 2]) for index in range(2)])
    for _ in range(4):
        engine.step()
    engine.abort([0, 1])
    assert made
    assert not speculator._states


def test_each_sequence_knows_what_became_of_its_guesses() -> None:
    requests = [
        SequenceRequest(
            index,
            [3, 4, 5, 6] * 4,
            Sampling(temperature=0.0, logit_bias={7 + index: 100.0}),
            Stopping(max_tokens=20, ignore_eos=True),
        )
        for index in range(2)
    ]
    # What it drafts does not depend on how long steps take.
    answers = {index: [7 + index] * 20 for index in range(2)}
    engine = make_engine(num_blocks=32, speculator=KnowingSpeculator(answers, VOCAB_SIZE))
    engine.add(requests)
    ends = [
        delta.timing
        for delta in iter_deltas(engine)
        if delta.finish is not None and delta.timing is not None
    ]
    load = engine.load()
    assert all(0 < end.accepted_draft_tokens <= end.drafted_tokens for end in ends)
    assert sum(end.drafted_tokens for end in ends) == load.drafted_tokens
    assert sum(end.accepted_draft_tokens for end in ends) == load.accepted_draft_tokens


def iter_deltas(engine: EngineCore) -> Iterator[Delta]:
    while engine.has_work:
        yield from engine.step().deltas
