"""Draft lengths follow what acceptance and step times promise, and nothing else."""

from __future__ import annotations

import itertools
import random

import pytest

from services.engine.core.speculation.acceptance import Acceptance
from services.engine.core.speculation.controller import MAX_DRAFT_TOKENS, DraftLengths
from services.engine.core.speculation.step_cost import StepCost


def memory_bound(num_tokens: int) -> float:
    """A step that reads all weights, whatever it computes."""
    return 1.0 + 0.01 * num_tokens


def compute_bound(num_tokens: int) -> float:
    return 0.1 + 1.0 * num_tokens


def survival(probability: float, length: int = MAX_DRAFT_TOKENS) -> list[float]:
    return [probability ** (index + 1) for index in range(length)]


def test_the_likelier_a_guess_the_longer_the_draft() -> None:
    lengths = [
        DraftLengths(memory_bound).choose(1, [survival(p)], 100)[0] for p in (0.0, 0.4, 0.7, 0.98)
    ]
    assert lengths == sorted(lengths)
    assert lengths[0] == 0
    assert lengths[-1] == MAX_DRAFT_TOKENS


def test_the_length_maximises_expected_tokens_per_second() -> None:
    guesses = survival(0.6)
    rates = [
        (1 + sum(guesses[:length])) / memory_bound(1 + length) for length in range(len(guesses) + 1)
    ]
    assert DraftLengths(memory_bound).choose(1, [guesses], 100) == [rates.index(max(rates))]


def test_nothing_is_drafted_where_a_step_costs_as_much_as_its_tokens() -> None:
    lengths = DraftLengths(compute_bound)
    assert lengths.choose(8, [survival(0.8)] * 8, 100) == [0] * 8
    assert not lengths.could_pay(8)


def test_sequences_compete_by_what_is_likeliest() -> None:
    taken = DraftLengths(memory_bound).choose(3, [survival(0.9), [], survival(0.3)], 6)
    assert sum(taken) <= 6
    assert taken[0] > taken[2]
    assert taken[1] == 0


def test_a_draft_that_was_passed_over_for_long_is_tried_again_and_ever_more_seldom() -> None:
    lengths = DraftLengths(compute_bound)
    tried = [
        step
        for step in range(2000)
        if lengths.could_pay(4) and any(lengths.choose(4, [survival(0.5)] * 4, 100))
    ]
    assert 3 <= len(tried) <= 8
    gaps = [later - earlier for earlier, later in itertools.pairwise(tried)]
    assert gaps == sorted(gaps)


def test_what_a_try_shows_turns_drafting_on_again() -> None:
    load = [compute_bound]
    lengths = DraftLengths(lambda num_tokens: load[0](num_tokens))
    assert lengths.choose(1, [survival(0.9)], 100) == [0]
    load[0] = memory_bound
    assert lengths.choose(1, [survival(0.9)], 100)[0] > 2


def test_costs_are_on_the_line_through_what_was_measured() -> None:
    cost = StepCost()
    assert not cost.is_measured
    assert cost.seconds(3) == cost.seconds(30)
    cost.observe(2, 1.0)
    assert cost.is_measured
    assert cost.seconds(1) == cost.seconds(9) == 1.0
    for num_tokens in (4, 9, 2, 17, 5) * 3:
        cost.observe(num_tokens, 0.8 + 0.1 * num_tokens)
    assert cost.seconds(1) == pytest.approx(0.9)
    assert cost.seconds(40) == pytest.approx(4.8)


def test_a_wider_step_costs_no_less_and_no_more_by_the_token() -> None:
    cost = StepCost()
    for num_tokens, seconds in ((1, 1.0), (3, 9.0), (5, 0.2)) * 5:
        cost.observe(num_tokens, seconds)
    assert cost.seconds(5) >= cost.seconds(1)
    cost = StepCost()
    for num_tokens, seconds in ((4, 1.0), (8, 9.0)) * 20:
        cost.observe(num_tokens, seconds)
    assert cost.seconds(8) <= 2 * cost.seconds(4)


def test_a_step_that_was_held_up_hardly_moves_the_cost() -> None:
    cost = StepCost()
    for _ in range(20):
        cost.observe(1, 1.0)
    cost.observe(1, 100.0)
    assert cost.seconds(1) < 1.2
    for _ in range(300):
        cost.observe(1, 3.0)
    assert cost.seconds(1) == pytest.approx(3.0, rel=0.05)


def test_a_rare_number_of_tokens_that_was_held_up_is_not_shunned() -> None:
    cost = StepCost()
    for num_tokens in (1, 1, 1, 4, 1, 1, 1, 8) * 5:
        cost.observe(num_tokens, 1 + 0.1 * num_tokens)
    cost.observe(17, 30.0)
    for num_tokens in (1, 1, 1, 4, 1, 1, 1, 8) * 5:
        cost.observe(num_tokens, 1 + 0.1 * num_tokens)
    assert cost.seconds(17) == pytest.approx(2.7, rel=0.3)


@pytest.mark.parametrize("share", [0.1, 0.9])
def test_acceptance_is_what_was_seen_of_late(share: float) -> None:
    rng = random.Random(1)
    acceptance = Acceptance(Acceptance())
    for _ in range(300):
        acceptance.observe(4, rng.random() < 1 - share)
    for _ in range(300):
        acceptance.observe(4, rng.random() < share)
    assert acceptance.probability(4) == pytest.approx(share, abs=0.2)


def test_a_new_sequence_is_believed_to_be_like_the_others() -> None:
    shared = Acceptance()
    before = Acceptance(shared).probability(3)
    other = Acceptance(shared)
    for _ in range(100):
        other.observe(3, True)
    assert Acceptance(shared).probability(3) > max(before, 0.9)


def test_survival_is_the_product_of_what_each_longer_match_promises() -> None:
    acceptance = Acceptance(Acceptance())
    survival = acceptance.survival(3, 3)
    first, second = acceptance.probability(3), acceptance.probability(4)
    assert survival == pytest.approx([first, first * second, first * second * second])
