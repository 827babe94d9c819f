"""Histograms for what happens all the time say the same as the library's own."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from prometheus_client import CollectorRegistry, Histogram
from prometheus_client.openmetrics.exposition import generate_latest

from services.runtime.telemetry import Metrics
from services.runtime.telemetry.distributions import Distributions

BOUNDS = (0.001, 0.25, 1.0, 10.0)
LABELS = st.sampled_from([("a", "x"), ("a", "y"), ("b", "x")])


@given(st.lists(st.tuples(LABELS, st.one_of(st.sampled_from(BOUNDS), st.floats(0, 100)))))
def test_what_is_exposed_is_what_the_library_would_expose(
    observed: list[tuple[tuple[str, str], float]],
) -> None:
    ours, theirs = CollectorRegistry(), CollectorRegistry()
    distributions = Distributions("pauses", "Pauses.", ("model", "kind"), BOUNDS)
    ours.register(distributions)
    histogram = Histogram("pauses", "Pauses.", ("model", "kind"), registry=theirs, buckets=BOUNDS)
    for labels, value in observed:
        distributions.labels(*labels).observe(value)
        histogram.labels(*labels).observe(value)
    assert generate_latest(ours) == generate_latest(theirs)


def test_one_that_is_not_declared_is_refused() -> None:
    with pytest.raises(KeyError):
        Metrics("gateway").distributions("meshserve_gateway_pauses")
