"""Rates and percentiles: for any observations, what is said of them holds."""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Sequence

from hypothesis import given
from hypothesis import strategies as st

from services.gateway.overview.rates import Histogram, growth, merged, ratio

BOUNDS = (0.001, 0.01, 0.1, 1.0, 10.0, math.inf)
durations = st.lists(st.floats(min_value=0, max_value=50), max_size=60)
some_durations = st.lists(st.floats(min_value=0, max_value=50), min_size=1, max_size=60)
shares = st.floats(min_value=0.01, max_value=1)


def histogram(observed: Sequence[float]) -> Histogram:
    counts = [0.0] * len(BOUNDS)
    for value in observed:
        counts[bisect_left(BOUNDS, value)] += 1
    return Histogram(BOUNDS, tuple(counts), sum(observed))


@given(some_durations, shares)
def test_a_quantile_lies_in_the_bucket_of_the_value_it_estimates(
    observed: list[float], share: float
) -> None:
    true = sorted(observed)[math.ceil(share * len(observed)) - 1]
    index = bisect_left(BOUNDS, true)
    lower = BOUNDS[index - 1] if index else 0.0
    upper = BOUNDS[index] if not math.isinf(BOUNDS[index]) else lower
    estimate = histogram(observed).quantile(share)
    assert lower - 1e-9 <= estimate <= upper


def test_quick_observations_are_not_called_slow_because_their_bucket_is_wide() -> None:
    assert histogram([0.00001] * 100).quantile(0.95) <= 0.00021


@given(some_durations, shares, shares)
def test_a_higher_share_never_has_a_lower_quantile(
    observed: list[float], one: float, other: float
) -> None:
    low, high = sorted((one, other))
    assert histogram(observed).quantile(low) <= histogram(observed).quantile(high)


@given(durations, durations)
def test_between_two_readings_lies_what_came_after_the_first(
    before: list[float], after: list[float]
) -> None:
    since = histogram(before + after).since(histogram(before))
    assert since.counts == histogram(after).counts
    assert math.isclose(since.sum, sum(after), abs_tol=1e-6)


@given(durations, some_durations)
def test_a_histogram_that_began_anew_is_taken_as_it_is(
    after: list[float], lost: list[float]
) -> None:
    assert histogram(after).since(histogram(after + lost)) == histogram(after)


@given(st.lists(durations, min_size=1, max_size=5))
def test_merged_histograms_are_those_of_all_observations(parts: list[list[float]]) -> None:
    together = merged(histogram(part) for part in parts)
    assert together is not None
    everything = histogram([value for part in parts for value in part])
    assert together.counts == everything.counts
    assert math.isclose(together.sum, everything.sum, abs_tol=1e-6)


def test_buckets_of_another_version_are_left_out() -> None:
    other = Histogram((1.0, math.inf), (5.0, 0.0), 2.0)
    assert merged([histogram([0.5]), other]) == histogram([0.5])
    assert merged([]) is None
    assert histogram([0.5]).since(other) == histogram([0.5])


@given(
    st.lists(st.floats(min_value=0, max_value=1e6), min_size=1),
    st.sets(st.integers(min_value=0, max_value=20)),
)
def test_growth_adds_up_over_restarts(increments: list[float], restarts: set[int]) -> None:
    """A counter that is started again now and then, read after each increment."""
    value, counted, lost = 0.0, 0.0, 0.0
    for number, increment in enumerate(increments):
        before = value
        if number in restarts:
            value = 0.0
        value += increment
        counted += growth(before, value)
        if number in restarts and value >= before:
            # Nobody can tell such a restart from a smaller increment.
            lost += before
    assert math.isclose(counted + lost, sum(increments), rel_tol=1e-9, abs_tol=1e-6)


@given(st.floats(min_value=0, max_value=1e9), st.floats(min_value=0, max_value=1e9))
def test_a_share_is_one_or_there_is_none(part: float, whole: float) -> None:
    share = ratio(part, whole)
    assert share is None if whole == 0 else share is not None and 0 <= share <= 1
