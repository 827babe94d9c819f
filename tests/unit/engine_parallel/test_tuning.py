"""Ranks choose kernels alike, by what all of them have measured."""

from __future__ import annotations

import torch

from services.engine.core.kernels.choice import Choice, Signature
from services.engine.core.parallel.tuning import agreed, from_wire, to_wire

PROJECTION: Signature = ("linear", torch.bfloat16, 64, 32, 16)
HEAD: Signature = ("scaled_linear", torch.float8_e4m3fn, 128, 32, 8)


def test_a_product_takes_as_long_as_on_the_rank_that_takes_the_longest() -> None:
    # Each rank finds another faster, and by the slowest of them it is the second.
    first = [Choice(PROJECTION, 1, {"cuda": 1.0, "triton": 2.0})]
    second = [Choice(PROJECTION, 1, {"cuda": 3.0, "triton": 2.5})]
    (choice,) = agreed([first, second])
    assert choice == Choice(PROJECTION, 1, {"cuda": 3.0, "triton": 2.5})
    assert choice.fastest == "triton"


def test_products_that_one_stage_has_or_one_rank_had_time_for_count_as_well() -> None:
    first = [Choice(PROJECTION, 1, {"cuda": 1.0, "triton": 2.0})]
    last = [Choice(HEAD, 1, {"cuda": 2.0, "torch": 1.0}), Choice(PROJECTION, 2, {"cuda": 1.0})]
    assert agreed([first, last]) == [*first, *last]


def test_an_implementation_that_a_rank_has_not_is_taken_by_none() -> None:
    first = [Choice(PROJECTION, 1, {"cuda": 2.0, "triton": 1.0})]
    second = [Choice(PROJECTION, 1, {"cuda": 2.0, "reference": 9.0})]
    assert agreed([first, second]) == [Choice(PROJECTION, 1, {"cuda": 2.0})]


def test_choices_are_the_same_on_the_other_side() -> None:
    choices = [
        Choice(PROJECTION, 1, {"cuda": 1.0, "triton": 2.0}),
        Choice(HEAD, 64, {"cuda": 2.0}),
    ]
    assert from_wire(to_wire(choices)) == choices
