"""Tenants that compete are served alike, whatever they ask for and however often."""

from __future__ import annotations

import pytest

from services.engine.core.fairness import TenantCounters
from services.engine.core.messages import SequenceRequest, Stopping
from services.engine.core.plan import SequenceOutput, StepOutputs
from services.engine.core.scheduler import Scheduler
from tests.fakes.engines import make_scheduler


def request(
    sequence_id: int, tenant: str, prompt_tokens: int, max_tokens: int, priority: int = 0
) -> SequenceRequest:
    return SequenceRequest(
        sequence_id,
        [sequence_id % 60] * prompt_tokens,
        stopping=Stopping(max_tokens=max_tokens, ignore_eos=True),
        tenant=tenant,
        priority=priority,
    )


def step(scheduler: Scheduler) -> dict[str, int]:
    """Run one step; returns the tokens planned by tenant."""
    plan = scheduler.schedule()
    served: dict[str, int] = {}
    outputs = []
    for sequence, count in zip(plan.sequences, plan.token_counts, strict=True):
        served[sequence.tenant] = served.get(sequence.tenant, 0) + count
        due = count == sequence.num_uncomputed_tokens
        outputs.append(SequenceOutput((7,) if due else ()))
    scheduler.apply(StepOutputs(plan, tuple(outputs), 1, 2))
    scheduler.check_integrity()
    return served


def serve(scheduler: Scheduler, steps: int) -> dict[str, int]:
    total: dict[str, int] = {}
    for _ in range(steps):
        for tenant, count in step(scheduler).items():
            total[tenant] = total.get(tenant, 0) + count
    return total


def busy(**limits: int) -> Scheduler:
    return make_scheduler(
        **({"num_blocks": 256, "max_running_sequences": 2, "max_waiting_sequences": 512} | limits)
    )


def test_a_tenant_that_asks_for_more_gets_no_more() -> None:
    scheduler = busy()
    scheduler.add([request(number, "greedy", 8, 8) for number in range(200)])
    scheduler.add([request(200 + number, "modest", 8, 8) for number in range(40)])
    served = serve(scheduler, 200)
    assert served["modest"] == pytest.approx(served["greedy"], rel=0.1)


def test_long_answers_count_for_what_they_cost() -> None:
    scheduler = busy()
    scheduler.add([request(number, "long", 4, 60) for number in range(20)])
    scheduler.add([request(100 + number, "short", 4, 4) for number in range(300)])
    served = serve(scheduler, 300)
    # Counted in requests, the short ones must be many more; counted in tokens, both are alike.
    assert served["short"] == pytest.approx(served["long"], rel=0.25)


def test_a_tenant_s_own_requests_go_in_order_of_arrival() -> None:
    scheduler = busy(max_running_sequences=1)
    scheduler.add([request(number, "ab"[number % 2], 2, 1) for number in range(6)])
    order = []
    while scheduler.has_work:
        plan = scheduler.schedule()
        order += [sequence.sequence_id for sequence in plan.sequences]
        outputs = tuple(SequenceOutput((7,)) for _ in plan.sequences)
        scheduler.apply(StepOutputs(plan, outputs, 1, 2))
    assert [number for number in order if number % 2 == 0] == [0, 2, 4]
    assert [number for number in order if number % 2 == 1] == [1, 3, 5]


def test_who_comes_later_is_not_owed_what_was_served_before() -> None:
    scheduler = busy()
    scheduler.add([request(number, "early", 8, 8) for number in range(200)])
    serve(scheduler, 100)
    scheduler.add([request(300 + number, "late", 8, 8) for number in range(100)])
    served = serve(scheduler, 100)
    assert served["late"] == pytest.approx(served["early"], rel=0.15)


def test_priority_goes_before_fairness() -> None:
    scheduler = busy(max_running_sequences=1)
    scheduler.add([request(number, "a", 2, 2) for number in range(3)])
    scheduler.add([request(10, "b", 2, 2, priority=-1)])
    first = serve(scheduler, 3 * 2)
    assert first.keys() == {"a"}


def test_counters_do_not_grow_with_the_tenants_ever_seen() -> None:
    counters = TenantCounters()
    for number in range(5000):
        counters.begin_waiting(f"tenant {number}", [])
        counters.charge(f"tenant {number}", 1)
    assert len(counters) <= 1024


def test_an_engine_without_work_owes_nobody() -> None:
    scheduler = busy()
    scheduler.add([request(0, "a", 8, 8), request(1, "b", 2, 2)])
    while scheduler.has_work:
        step(scheduler)
    assert len(scheduler._tenants) == 0
