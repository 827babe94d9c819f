"""What the scheduler promises, one promise a test."""

from __future__ import annotations

import pytest

from services.engine.core.errors import (
    DrainingError,
    DuplicateSequenceError,
    InvalidSequenceError,
    NeverFitsError,
    QueueFullError,
)
from services.engine.core.messages import FinishReason, SequenceRequest, Stopping
from services.engine.core.plan import Plan, SequenceOutput, StepOutputs
from services.engine.core.scheduler import Scheduler
from tests.fakes.engines import make_scheduler

TOKEN = 7


def request(
    sequence_id: int, prompt_tokens: int, max_tokens: int = 32, priority: int = 0
) -> SequenceRequest:
    """A request whose prompt has no beginning in common with that of any other id."""
    return SequenceRequest(
        sequence_id,
        [sequence_id + 8] * prompt_tokens,
        stopping=Stopping(max_tokens=max_tokens, ignore_eos=True),
        priority=priority,
    )


def step(scheduler: Scheduler) -> dict[int, int]:
    """Run one step as if every due sequence sampled TOKEN; returns the plan by sequence id."""
    plan = scheduler.schedule()
    scheduler.apply(outputs_of(plan))
    scheduler.check_integrity()
    return {
        sequence.sequence_id: count
        for sequence, count in zip(plan.sequences, plan.token_counts, strict=True)
    }


def outputs_of(plan: Plan, failing: int | None = None) -> StepOutputs:
    outputs = []
    for sequence, count in zip(plan.sequences, plan.token_counts, strict=True):
        if sequence.sequence_id == failing:
            outputs.append(SequenceOutput(error=RuntimeError("broken")))
        else:
            due = count == sequence.num_uncomputed_tokens
            outputs.append(SequenceOutput((TOKEN,) if due else ()))
    return StepOutputs(plan, tuple(outputs), 1, 2)


def test_a_long_prompt_is_computed_in_chunks_of_the_budget() -> None:
    scheduler = make_scheduler(max_batch_tokens=16)
    scheduler.add([request(0, 40, 8)])
    assert [step(scheduler) for _ in range(4)] == [{0: 16}, {0: 16}, {0: 8}, {0: 1}]


def test_decodes_come_before_prefills_and_share_the_step_with_them() -> None:
    scheduler = make_scheduler(max_batch_tokens=16)
    scheduler.add([request(0, 4)])
    step(scheduler)
    scheduler.add([request(1, 30)])
    assert step(scheduler) == {0: 1, 1: 15}
    assert step(scheduler) == {0: 1, 1: 15}
    assert step(scheduler) == {0: 1, 1: 1}


def test_sequences_join_and_leave_at_every_step() -> None:
    scheduler = make_scheduler()
    scheduler.add([request(0, 2, max_tokens=2)])
    assert step(scheduler) == {0: 2}
    scheduler.add([request(1, 3)])
    assert step(scheduler) == {0: 1, 1: 3}
    assert step(scheduler) == {1: 1}


def test_higher_priorities_enter_first_and_equal_ones_in_order_of_arrival() -> None:
    scheduler = make_scheduler(max_running_sequences=1)
    scheduler.add([request(0, 2, 1), request(1, 2, 1), request(2, 2, 1, priority=5)])
    assert [list(step(scheduler)) for _ in range(3)] == [[2], [0], [1]]


def test_nobody_overtakes_a_head_that_does_not_fit() -> None:
    scheduler = make_scheduler(num_blocks=8, block_size=4)
    scheduler.add([request(0, 16, 8)])
    step(scheduler)
    scheduler.add([request(1, 20, 8), request(2, 1, 8)])
    assert step(scheduler) == {0: 1}


def test_a_full_pool_preempts_the_latest_arrival_of_the_lowest_priority() -> None:
    scheduler = make_scheduler(num_blocks=8, block_size=4, max_batch_tokens=32)
    scheduler.add([request(0, 7, 20), request(1, 7, 20, priority=1), request(2, 7, 20)])
    assert step(scheduler) == {1: 7, 0: 7, 2: 7}
    while scheduler.preemptions == 0:
        planned = step(scheduler)
    assert set(planned) == {0, 1}
    assert scheduler.num_waiting == 1


def test_a_preempted_sequence_keeps_its_place_and_its_tokens() -> None:
    scheduler = make_scheduler(num_blocks=8, block_size=4, max_batch_tokens=32)
    scheduler.add([request(0, 12, 10), request(1, 12, 20)])
    while scheduler.preemptions == 0:
        step(scheduler)
    scheduler.add([request(2, 1, 2)])
    while scheduler.num_waiting == 2:
        planned = step(scheduler)
    # It comes back no later than who arrived after it.
    assert 1 in planned
    while scheduler.has_work:
        step(scheduler)
    assert scheduler.pool.num_used == 0


def test_a_request_that_can_never_fit_is_refused_at_once() -> None:
    scheduler = make_scheduler(num_blocks=8, block_size=4)
    with pytest.raises(NeverFitsError):
        scheduler.add([request(0, 30, 3)])
    scheduler.add([request(0, 30, 2)])
    assert step(scheduler)


def test_without_max_tokens_a_sequence_ends_at_the_context() -> None:
    scheduler = make_scheduler(num_blocks=2, block_size=4)
    scheduler.add([SequenceRequest(0, [1] * 5, stopping=Stopping(ignore_eos=True))])
    updates = []
    while scheduler.has_work:
        updates += scheduler.apply(outputs_of(scheduler.schedule()))
    assert len(updates) == 3
    assert updates[-1].finish is not None
    assert updates[-1].finish.reason is FinishReason.LENGTH


def test_a_full_queue_refuses_all_of_a_request_and_keeps_none() -> None:
    scheduler = make_scheduler(max_waiting_sequences=3)
    scheduler.add([request(0, 1), request(1, 1)])
    with pytest.raises(QueueFullError):
        scheduler.add([request(2, 1), request(3, 1)])
    assert scheduler.num_waiting == 2
    scheduler.add([request(2, 1)])


@pytest.mark.parametrize(
    "bad",
    [
        SequenceRequest(9, []),
        SequenceRequest(9, [64]),
        SequenceRequest(9, [-1]),
        SequenceRequest(9, [1], stopping=Stopping(max_tokens=0)),
        SequenceRequest(9, [1], stopping=Stopping(stop_sequences=((),))),
    ],
)
def test_one_invalid_sequence_refuses_the_request(bad: SequenceRequest) -> None:
    scheduler = make_scheduler()
    with pytest.raises(InvalidSequenceError):
        scheduler.add([request(0, 1), bad])
    assert not scheduler.has_work


def test_ids_are_unique_among_the_living() -> None:
    scheduler = make_scheduler()
    scheduler.add([request(0, 1, max_tokens=1)])
    with pytest.raises(DuplicateSequenceError):
        scheduler.add([request(0, 1)])
    step(scheduler)
    scheduler.add([request(0, 1)])


def test_draining_finishes_what_there_is() -> None:
    scheduler = make_scheduler()
    scheduler.add([request(0, 1, max_tokens=2)])
    scheduler.draining = True
    with pytest.raises(DrainingError):
        scheduler.add([request(1, 1)])
    step(scheduler)
    step(scheduler)
    assert not scheduler.has_work


def test_a_failed_sequence_leaves_the_others_running() -> None:
    scheduler = make_scheduler()
    scheduler.add([request(0, 2), request(1, 2)])
    updates = scheduler.apply(outputs_of(scheduler.schedule(), failing=0))
    scheduler.check_integrity()
    assert updates[0].finish is not None
    assert updates[0].finish.reason is FinishReason.ERROR
    assert step(scheduler) == {1: 1}


def test_aborting_frees_blocks_at_once_wherever_the_sequence_is() -> None:
    scheduler = make_scheduler(max_running_sequences=1)
    scheduler.add([request(0, 5), request(1, 5)])
    step(scheduler)
    assert scheduler.pool.num_used > 0
    for sequence_id in (0, 1):
        assert scheduler.abort(sequence_id) is not None
        scheduler.check_integrity()
    assert scheduler.pool.num_used == 0
    assert not scheduler.has_work
    assert scheduler.abort(0) is None
