"""Prompts join the steps of those who decode, as far as these can bear it."""

from __future__ import annotations

import pytest

from services.engine.core.messages import SequenceRequest
from services.engine.core.sequence import Sequence
from services.engine.core.token_budget import TokenBudget, share

MS = 1_000_000


def prefills(*lengths: int, priorities: tuple[int, ...] = ()) -> list[Sequence]:
    """Prefills under way, best rank first."""
    sequences = [
        Sequence(
            SequenceRequest(number, [1] * length, priority=(priorities or (0,) * 9)[number]),
            arrival=number,
            eos_token_ids=(),
            max_tokens=1,
            queued_ns=0,
        )
        for number, length in enumerate(lengths)
    ]
    return sorted(sequences, key=lambda sequence: sequence.rank)


def shares(num_tokens: int, sequences: list[Sequence]) -> list[int]:
    given = share(num_tokens, sequences)
    return [given.get(sequence, 0) for sequence in sequences]


def run_steps(budget: TokenBudget, *, decode_ms: float, token_ms: float, steps: int) -> list[float]:
    """Steps that prefill all they may beside 8 decodes; returns their durations in ms."""
    durations = []
    for _ in range(steps):
        tokens = budget.prefill_tokens(8)
        durations.append(decode_ms + tokens * token_ms)
        budget.observe(8, tokens, int(durations[-1] * MS))
    return durations


@pytest.mark.parametrize(
    ("token_ms", "step_ms"),
    [
        (0.1, 20 + 504 * 0.1),  # as much as a step computes is done before
        (0.25, 100),
        (1.0, 100),
        (4.0, 20 + 32 * 4.0),  # a sixteenth of a step's tokens is the least
    ],
)
def test_steps_with_decodes_come_to_meet_the_target(token_ms: float, step_ms: float) -> None:
    budget = TokenBudget(512, 100 * MS)
    budget.observe(8, 0, 20 * MS)
    durations = run_steps(budget, decode_ms=20, token_ms=token_ms, steps=30)
    assert durations[-1] == pytest.approx(step_ms, rel=0.1)


def test_the_target_is_met_without_a_step_that_only_decodes() -> None:
    budget = TokenBudget(512, 100 * MS)
    durations = run_steps(budget, decode_ms=30, token_ms=0.5, steps=40)
    assert durations[-1] == pytest.approx(100, rel=0.1)


def test_the_budget_follows_when_tokens_become_dearer() -> None:
    budget = TokenBudget(512, 100 * MS)
    run_steps(budget, decode_ms=20, token_ms=0.3, steps=20)
    durations = run_steps(budget, decode_ms=20, token_ms=0.9, steps=20)
    assert durations[-1] == pytest.approx(100, rel=0.1)


def test_one_slow_step_does_not_throw_the_budget_off() -> None:
    budget = TokenBudget(512, 100 * MS)
    run_steps(budget, decode_ms=20, token_ms=0.3, steps=20)
    before = budget.prefill_tokens(8)
    budget.observe(8, before, 400 * MS)
    assert budget.prefill_tokens(8) > before / 2


def test_prompts_advance_however_slow_the_decodes_are() -> None:
    budget = TokenBudget(512, 100 * MS)
    budget.observe(8, 0, 500 * MS)
    budget.observe(0, 512, 500 * MS)
    assert budget.prefill_tokens(8) == 32


def test_a_step_without_decodes_takes_all_it_can() -> None:
    budget = TokenBudget(512, 100 * MS)
    budget.observe(0, 512, 5000 * MS)
    assert budget.prefill_tokens(0) == 512
    assert budget.prefill_tokens(8) < 512


def test_decodes_and_prefills_together_never_exceed_a_step() -> None:
    budget = TokenBudget(64, 10_000 * MS)
    budget.observe(1, 63, 1 * MS)
    assert budget.prefill_tokens(60) == 4
    assert budget.prefill_tokens(64) == 0


def test_short_prompts_get_through_beside_a_long_one() -> None:
    assert shares(100, prefills(1000, 20, 30)) == [50, 20, 30]


def test_what_short_prompts_leave_goes_to_the_long_one() -> None:
    assert shares(100, prefills(1000, 20)) == [80, 20]
    assert shares(100, prefills(1000)) == [100]


def test_the_earliest_is_sure_of_half_however_many_short_ones_come() -> None:
    assert shares(100, prefills(1000, 40, 40, 40)) == [50, 40, 10, 0]


def test_equal_prompts_are_computed_one_after_the_other() -> None:
    assert shares(100, prefills(80, 80, 80)) == [80, 20, 0]


def test_a_higher_priority_takes_what_it_can_use() -> None:
    assert shares(100, prefills(10, 200, 500, priorities=(0, 0, 1))) == [100, 0, 0]
    assert shares(100, prefills(10, 200, 60, priorities=(0, 0, 1))) == [60, 10, 30]


@pytest.mark.parametrize("num_tokens", [0, 1, 7, 64, 500])
def test_shares_add_up_and_go_no_further_than_what_is_left_to_compute(num_tokens: int) -> None:
    sequences = prefills(3, 60, 17, 200, priorities=(0, 1, 0, 0))
    given = share(num_tokens, sequences)
    assert sum(given.values()) == min(num_tokens, 280)
    assert all(0 < count <= sequence.num_tokens for sequence, count in given.items())
