"""The window over what a replica says of itself."""

from __future__ import annotations

import asyncio
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from meshserve.v1 import monitor_pb2
from services.gateway.overview.readings import WINDOW_S, History, Reading, Window, having
from services.runtime.health import HealthMonitor
from services.runtime.monitor import Monitor
from services.runtime.telemetry import Metrics

REQUESTS = "meshserve_gateway_requests"


def counters(at: float, instance: str = "a", **values: float) -> Reading:
    """A reading of requests by tenant."""
    metric = monitor_pb2.Metric(
        name=REQUESTS,
        kind=monitor_pb2.METRIC_KIND_COUNTER,
        label_names=["tenant"],
        samples=[
            monitor_pb2.MetricSample(label_values=[tenant], value=value)
            for tenant, value in values.items()
        ],
    )
    status = monitor_pb2.GetStatusResponse(instance_id=instance, metrics=[metric])
    return Reading(at, status)


def window(*readings: Reading) -> Window:
    history = History()
    for reading in readings[:-1]:
        history.add(reading)
    return history.add(readings[-1])


def test_a_rate_is_what_was_counted_by_the_time_it_took() -> None:
    over = window(counters(0, acme=5), counters(2, acme=9), counters(4, acme=25))
    assert over.rate(REQUESTS) == 5.0
    assert over.total(REQUESTS) == 25


def test_one_reading_has_totals_and_no_rates() -> None:
    over = window(counters(0, acme=5))
    assert (over.total(REQUESTS), over.rate(REQUESTS), over.seconds) == (5, 0, 0)


def test_a_label_that_is_new_counts_from_nothing() -> None:
    over = window(counters(0, acme=5), counters(1, acme=5, zeta=3))
    assert over.rate(REQUESTS) == 3
    assert over.rate(REQUESTS, having("tenant", "acme")) == 0


def test_another_process_at_the_address_begins_anew() -> None:
    over = window(counters(0, acme=100), counters(1, "b", acme=2), counters(2, "b", acme=3))
    assert (over.seconds, over.rate(REQUESTS)) == (1, 1)


def test_a_metric_that_is_absent_counts_nothing() -> None:
    over = window(counters(0, acme=1), counters(1, acme=2))
    assert over.rate("meshserve_gateway_cost") == 0
    assert over.observed("meshserve_gateway_request_duration_seconds") is None


@given(st.lists(st.floats(min_value=0.25, max_value=3), min_size=1, max_size=60))
def test_the_window_is_as_long_as_it_should_be(pauses: list[float]) -> None:
    """At least WINDOW_S once that has passed, and at most one pause longer."""
    history, now = History(), 0.0
    over = history.add(counters(now))
    for pause in pauses:
        now += pause
        over = history.add(counters(now))
    assert math.isclose(over.last.at, now)
    assert over.seconds <= WINDOW_S + max(pauses)
    assert over.seconds >= min(now, WINDOW_S) - 1e-9


@given(st.lists(st.floats(min_value=0, max_value=200), min_size=1, max_size=40))
def test_what_a_process_observes_comes_through_unchanged(observed: list[float]) -> None:
    """From a real histogram, over its form on the wire, to the window."""
    name = "meshserve_gateway_time_to_first_token_seconds"
    metrics = Metrics("gateway")
    replica = monitor(metrics)
    first = Reading(0, replica.status())
    for value in observed:
        metrics.histogram(name).labels("demo").observe(value)
    over = window(first, Reading(1, replica.status()))
    found = over.observed(name, having("model", "demo"))
    assert found is not None
    assert found.count == len(observed)
    assert found.sum == pytest.approx(sum(observed))
    below = 0.0
    for bound, count in zip(found.bounds, found.counts, strict=True):
        below += count
        assert below == sum(value <= bound for value in observed)
    assert over.observed(name, having("model", "other")) is None


def monitor(metrics: Metrics) -> Monitor:
    async def healthy() -> None:
        return None

    return Monitor(HealthMonitor([], healthy, metrics), metrics, asyncio.Event())
