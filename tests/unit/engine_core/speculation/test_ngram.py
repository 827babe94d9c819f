"""Prompt look-up finds the longest recent match, however the tokens arrive."""

from __future__ import annotations

import itertools
from array import array

import hypothesis.strategies as st
import pytest
from hypothesis import given

from services.engine.core.speculation.ngram import MAX_MATCH, MIN_MATCH, PromptLookup


def agreement(tokens: list[int], source: int) -> int:
    """How many tokens before `source` equal the last ones."""
    length = 0
    while length < source and tokens[source - length - 1] == tokens[len(tokens) - length - 1]:
        length += 1
    return length


def looked_up(tokens: list[int]) -> PromptLookup:
    lookup = PromptLookup()
    lookup.advance(array("q", tokens))
    return lookup


def test_what_followed_the_last_tokens_is_drafted() -> None:
    tokens = [7, 1, 2, 3, 4, 5, 6, 9, 8, 2, 3]
    lookup = looked_up(tokens)
    assert lookup.match_length == 2
    assert lookup.draft(array("q", tokens), 3) == (4, 5, 6)


def test_nothing_is_drafted_where_nothing_repeats() -> None:
    tokens = [*range(100), 3]  # one token that agrees is no match
    assert looked_up(tokens).draft(array("q", tokens), 4) == ()


def test_a_longer_match_goes_before_a_newer_one_and_a_newer_one_before_as_long_a_one() -> None:
    longer = [1, 2, 3, 10, 9, 2, 3, 20, 1, 2, 3]
    assert looked_up(longer).draft(array("q", longer), 1) == (10,)
    newer = [2, 3, 10, 9, 2, 3, 20, 7, 2, 3]
    assert looked_up(newer).draft(array("q", newer), 1) == (20,)


@pytest.mark.parametrize("length", [1, 2, 3, 7])
def test_a_loop_is_drafted_as_far_ahead_as_asked(length: int) -> None:
    tokens = [5, 1, 2, 3, 1, 2, 3, 1]
    expected = (2, 3, 1, 2, 3, 1, 2)[:length]
    assert looked_up(tokens).draft(array("q", tokens), length) == expected


@given(
    tokens=st.lists(st.integers(0, 3), min_size=1, max_size=300),
    chunks=st.lists(st.integers(1, 90), max_size=20),
)
def test_what_is_followed_always_agrees_however_tokens_arrive(
    tokens: list[int], chunks: list[int]
) -> None:
    lookup = PromptLookup()
    known = array("q")
    while len(known) < len(tokens):
        count = chunks.pop() if chunks else 1
        known.extend(tokens[len(known) : len(known) + count])
        lookup.advance(known)
        so_far = list(known)
        assert lookup.num_tokens == len(so_far)
        if not lookup.match_length:
            # Nothing is missed: no pair like the last one came before.
            assert tuple(so_far[-2:]) not in itertools.pairwise(so_far[:-1])
            continue
        source = lookup._source
        assert MIN_MATCH <= source < len(so_far)
        assert min(agreement(so_far, source), MAX_MATCH) >= lookup.match_length >= MIN_MATCH
        assert lookup.draft(known, 1) == (so_far[source],)


def test_guesses_are_checked_against_what_came_whether_or_not_they_were_asked_for() -> None:
    lookup = PromptLookup()
    checked: list[tuple[int, bool]] = []
    tokens = array("q", [1, 2, 3, 4, 9, 1, 2])
    lookup.advance(tokens)
    for token in (3, 4, 5, 6):
        tokens.append(token)
        lookup.advance(tokens, lambda length, correct: checked.append((length, correct)))
    # After a wrong one nothing is followed, and what comes next ends no match.
    assert checked == [(2, True), (3, True), (4, False), (0, False)]


def test_token_ids_that_share_a_bucket_are_not_taken_for_each_other() -> None:
    # As many distinct pairs as the table has buckets, several times over: many collide.
    tokens = array("q", range(5000))
    lookup = PromptLookup()
    for end in range(1, len(tokens) + 1):
        lookup.advance(tokens[:end])
        assert lookup.match_length == 0
