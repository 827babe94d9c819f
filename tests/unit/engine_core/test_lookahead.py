"""A step may be planned while the one before it computes: it is the same step, and costs nobody."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from services.engine.core.engine import EngineCore
from services.engine.core.errors import IntegrityError
from services.engine.core.messages import Sampling, SequenceRequest, Stopping
from services.engine.core.plan import Plan, SequenceOutput, StepOutputs
from services.engine.core.scheduler import Scheduler
from services.engine.core.speculation.speculator import NgramSpeculator, Speculator
from tests.fakes.engines import make_engine, make_scheduler
from tests.fakes.hash_model import NAN_TOKEN_ID
from tests.fakes.speculators import HalfRightSpeculator

TOKEN = 7


def request(sequence_id: int, prompt_tokens: int = 3, max_tokens: int = 20) -> SequenceRequest:
    stopping = Stopping(max_tokens=max_tokens, ignore_eos=True)
    return SequenceRequest(sequence_id, [sequence_id + 8] * prompt_tokens, stopping=stopping)


def outputs_of(plan: Plan) -> StepOutputs:
    return StepOutputs(plan, tuple(SequenceOutput((TOKEN,)) for _ in plan.sequences), 1, 2)


def decoding(*requests: SequenceRequest, **limits: int) -> Scheduler:
    scheduler = make_scheduler(**limits)
    scheduler.add(list(requests))
    scheduler.apply(outputs_of(scheduler.schedule()))
    return scheduler


def test_a_guess_that_comes_true_is_the_next_plan() -> None:
    scheduler = decoding(request(0), request(1))
    for _ in range(12):  # over the ends of blocks
        plan = scheduler.schedule()
        guess = scheduler.lookahead.guess(plan)
        scheduler.check_integrity()
        assert guess is not None
        scheduler.apply(outputs_of(plan))
        plain = Plan(plan.step + 1, plan.sequences, (1, 1))
        assert scheduler.schedule() is guess == plain
        scheduler.check_integrity()


@pytest.mark.parametrize("change", ["an end", "an abort", "an arrival"])
def test_a_guess_that_does_not_come_true_is_dropped_and_leaves_nothing(change: str) -> None:
    scheduler = decoding(request(0), request(1, max_tokens=2 if change == "an end" else 20))
    plan = scheduler.schedule()
    guess = scheduler.lookahead.guess(plan)
    assert guess is not None
    scheduler.apply(outputs_of(plan))
    if change == "an abort":
        scheduler.abort(1)
    if change == "an arrival":
        scheduler.add([request(2)])
    scheduler.check_integrity()
    planned = [sequence.sequence_id for sequence in scheduler.schedule().sequences]
    assert planned == ([0, 1, 2] if change == "an arrival" else [0])
    scheduler.check_integrity()
    for sequence_id in range(3):
        scheduler.abort(sequence_id)
    assert scheduler.pool.num_used == 0


def test_nothing_is_guessed_while_prompts_are_computed() -> None:
    scheduler = make_scheduler()
    scheduler.add([request(0)])
    assert scheduler.lookahead.guess(scheduler.schedule()) is None


def test_nothing_is_guessed_where_somebody_would_have_to_go() -> None:
    scheduler = decoding(request(0, 4, 4), request(1, 4, 4), num_blocks=3)
    plan = scheduler.schedule()
    assert len(plan.sequences) == 1
    assert scheduler.lookahead.guess(plan) is None


def answers_of(engine: EngineCore, requests: list[SequenceRequest]) -> dict[int, list[int]]:
    engine.add(requests)
    answers: dict[int, list[int]] = {}
    while engine.has_work:
        for delta in engine.step().deltas:
            answers.setdefault(delta.sequence_id, []).extend(delta.token_ids)
        engine.check_integrity()
    return answers


@pytest.mark.parametrize(
    "make_speculator", [lambda: None, NgramSpeculator, lambda: HalfRightSpeculator(96, seed=1)]
)
def test_answers_are_the_same(make_speculator: Callable[[], Speculator | None]) -> None:
    requests = [
        SequenceRequest(
            index,
            [1, 2, 3, index, NAN_TOKEN_ID if index == 4 else 9],
            Sampling(
                temperature=index % 2, seed=index, presence_penalty=1.0 if index == 5 else 0.0
            ),
            Stopping(max_tokens=5 + 3 * index, min_tokens=index % 3, ignore_eos=True),
        )
        for index in range(7)
    ]

    def answers(plans_ahead: bool) -> dict[int, list[int]]:
        engine = make_engine(
            num_blocks=24,
            plans_ahead=plans_ahead,
            speculator=make_speculator(),
        )
        return answers_of(engine, requests)

    assert answers(plans_ahead=True) == answers(plans_ahead=False)


def test_a_step_that_fails_is_run_again_one_by_one(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = make_engine(plans_ahead=True)
    engine.add([request(0), request(1)])
    for _ in range(3):
        engine.step()
    runner = engine._runner._runner
    model = runner._model

    def fail_together(batch: object, kv_cache: object) -> object:
        if len(batch.query_lengths) > 1:  # type: ignore[attr-defined]
            raise RuntimeError("too many")
        return model(batch, kv_cache)  # type: ignore[arg-type]

    monkeypatch.setattr(runner, "_model", fail_together)
    found = answers_of(engine, [])
    expected = answers_of(make_engine(), [request(0), request(1)])
    assert {key: tokens[3:] for key, tokens in expected.items()} == found


def test_a_state_found_broken_in_planning_ahead_is_fatal(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = make_engine(plans_ahead=True)
    engine.add([request(0)])

    def fail(_: Plan) -> None:
        raise IntegrityError("broken")

    monkeypatch.setattr(engine._scheduler.lookahead, "guess", fail)
    with pytest.raises(IntegrityError):
        engine.step()
