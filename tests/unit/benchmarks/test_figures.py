"""Percentiles, throughput, goodput and what two rounds come to."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from benchmarks.figures import ServiceLevel, percentile, summarize
from benchmarks.load import Run, Trace
from benchmarks.mesh_overhead import overhead


def trace(sent_s: float, *message_s: float, tokens: int) -> Trace:
    return Trace(sent_s=sent_s, message_s=list(message_s), output_tokens=tokens)


@given(
    st.lists(st.floats(0, 1e6), min_size=1, max_size=50),
    st.floats(0, 100),
)
def test_a_percentile_is_the_one_that_numpy_gives(values: list[float], percent: float) -> None:
    assert percentile(values, percent) == pytest.approx(float(np.percentile(values, percent)))


def test_nothing_measured_has_no_figures() -> None:
    with pytest.raises(ValueError, match="no values"):
        percentile([], 50)
    with pytest.raises(ValueError, match="no runs"):
        summarize([])


def test_latencies_are_those_that_a_reader_sees() -> None:
    # Sent at 1.0: a token at 1.5, then two at once at 1.8.
    seen = trace(1.0, 1.5, 1.8, tokens=3)

    assert seen.first_token_s == pytest.approx(0.5)
    assert seen.gaps_s == [pytest.approx(0.3)]
    assert seen.per_token_s == pytest.approx(0.15)
    assert seen.end_to_end_s == pytest.approx(0.8)


def test_a_summary_takes_the_median_of_rates_and_pools_latencies() -> None:
    runs = [
        Run("W1", duration_s, [trace(0, first_s, duration_s, tokens=10)])
        for duration_s, first_s in ((1.0, 0.1), (2.0, 0.2), (5.0, 0.9))
    ]

    summary = summarize(runs)

    assert summary.rounds == 3
    assert summary.output_tokens_per_s == pytest.approx(5.0)
    assert summary.output_tokens_per_s_range == (pytest.approx(2.0), pytest.approx(10.0))
    assert summary.ttft_p50_ms == pytest.approx(200)
    assert summary.end_to_end_p99_ms == pytest.approx(1e3 * np.percentile([1, 2, 5], 99))


def test_goodput_counts_only_requests_that_kept_both_limits() -> None:
    level = ServiceLevel(first_token_s=1.0, per_token_s=0.05)
    good = trace(0, 0.5, 0.7, tokens=5)
    late = trace(0, 1.5, 1.6, tokens=5)
    slow = trace(0, 0.5, 2.0, tokens=5)

    summary = summarize([Run("W2", 2.0, [good, late, slow, good])], level)

    assert summary.goodput_requests_per_s == pytest.approx(1.0)
    assert summary.kept_service_level == pytest.approx(0.5)


def test_the_overhead_is_the_median_of_the_ratios_turn_by_turn() -> None:
    def runs(*durations_s: float) -> list[Run]:
        return [Run("W3", each, [trace(0, each, tokens=100)]) for each in durations_s]

    result = overhead(core=runs(1.0, 2.0, 4.0), mesh=runs(1.1, 2.1, 4.8))

    assert result.overhead_percent == pytest.approx(10)
    assert result.overhead_percent_range == (pytest.approx(5), pytest.approx(20))
    assert result.core_tokens_per_s == pytest.approx(50)
