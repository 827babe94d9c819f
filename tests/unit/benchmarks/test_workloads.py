"""Workloads have the sizes they say, real text, and no prompt twice."""

from __future__ import annotations

import random

import pytest

from benchmarks.prompts import DISTINCT_START_TOKENS, PromptSource, english_text
from benchmarks.workloads import SHAPES, Shape, make_rounds, make_workload

TEXT = tuple(random.Random(0).choices(range(50_000), k=60_000))


def shape(name: str) -> Shape:
    return next(each for each in SHAPES if each.name == name)


@pytest.mark.parametrize("each", SHAPES, ids=lambda each: each.name)
def test_a_workload_has_the_lengths_of_its_shape(each: Shape) -> None:
    workload = make_workload(each, PromptSource(TEXT, seed=3), seed=3)

    assert len(workload.requests) == each.num_requests
    assert workload.concurrency == each.concurrency <= each.num_requests
    for request in workload.requests:
        own = len(request.prompt_token_ids) - each.shared_prefix_tokens
        assert each.prompt_tokens[0] <= own <= each.prompt_tokens[1]
        assert each.output_tokens[0] <= request.output_tokens <= each.output_tokens[1]


def test_no_two_prompts_of_a_whole_run_begin_alike_but_for_the_shared_prefix() -> None:
    rounds = make_rounds(SHAPES, PromptSource(TEXT, seed=1), rounds=3, seed=1)

    starts: list[tuple[int, ...]] = []
    for workloads in rounds:
        for workload in workloads:
            skip = shape(workload.name).shared_prefix_tokens
            starts += [
                request.prompt_token_ids[skip : skip + DISTINCT_START_TOKENS]
                for request in workload.requests
            ]
    assert len(starts) == len(set(starts))


def test_the_requests_of_w4_share_their_prefix_and_two_rounds_do_not() -> None:
    first, second = make_rounds([shape("W4")], PromptSource(TEXT, seed=1), rounds=2, seed=1)

    prefixes = [
        {request.prompt_token_ids[:1024] for request in workloads[0].requests}
        for workloads in (first, second)
    ]
    assert [len(each) for each in prefixes] == [1, 1]
    assert prefixes[0] != prefixes[1]


def test_rounds_ask_for_equal_work() -> None:
    first, second = make_rounds([shape("W3")], PromptSource(TEXT, seed=1), rounds=2, seed=1)

    assert first[0].output_tokens == second[0].output_tokens
    assert first[0].prompt_tokens == second[0].prompt_tokens


def test_a_seed_decides_everything() -> None:
    def make(seed: int) -> object:
        return make_rounds(SHAPES, PromptSource(TEXT, seed), rounds=1, seed=seed)

    assert make(1) == make(1)
    assert make(1) != make(2)


def test_a_text_that_is_too_short_is_refused() -> None:
    source = PromptSource(tuple(range(20)), seed=0)
    with pytest.raises(ValueError, match="do not give another prompt of 21"):
        source.take(21)

    source.take(20)
    with pytest.raises(ValueError, match="do not give another prompt of 20"):
        source.take(20)


def test_the_text_is_english_and_long_enough_for_the_longest_prompt() -> None:
    words = english_text().split()

    assert len(words) > 10 * max(each.prompt_tokens[1] for each in SHAPES)
    assert sum(word == "the" for word in words) / len(words) > 0.02
