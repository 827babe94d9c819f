"""When the pool is full, what is lost is little, nobody waits for a lower priority, all get on."""

from __future__ import annotations

import pytest

from services.engine.core.admission import ConcurrencyLimit, QueueLimits
from services.engine.core.block_pool import BlockPool
from services.engine.core.clock import now_ns
from services.engine.core.errors import QueueFullError
from services.engine.core.messages import MAX_INTERRUPTIONS, SequenceRequest, Stopping
from services.engine.core.plan import SequenceOutput, StepOutputs
from services.engine.core.preemption import choose_victim, victims_for
from services.engine.core.scheduler import Scheduler
from services.engine.core.sequence import Sequence
from tests.fakes.engines import make_scheduler

BLOCK_SIZE = 4


def request(
    sequence_id: int, prompt_tokens: int, max_tokens: int = 32, priority: int = 0
) -> SequenceRequest:
    return SequenceRequest(
        sequence_id,
        [sequence_id % 60] * prompt_tokens,
        stopping=Stopping(max_tokens=max_tokens, ignore_eos=True),
        priority=priority,
    )


def step(scheduler: Scheduler) -> dict[int, int]:
    """Run one step; returns the plan by sequence id."""
    plan = scheduler.schedule()
    scheduler.apply(
        StepOutputs(
            plan,
            tuple(
                SequenceOutput((7,) if count == sequence.num_uncomputed_tokens else ())
                for sequence, count in zip(plan.sequences, plan.token_counts, strict=True)
            ),
            1,
            2,
        )
    )
    scheduler.check_integrity()
    return {
        sequence.sequence_id: count
        for sequence, count in zip(plan.sequences, plan.token_counts, strict=True)
    }


def running(pool: BlockPool, *tokens: int, priorities: tuple[int, ...] = ()) -> list[Sequence]:
    """Sequences that have computed so many tokens, best rank first."""
    sequences = []
    for number, count in enumerate(tokens):
        sequence = Sequence(
            request(number, count + 1, priority=(priorities or (0,) * 9)[number]),
            arrival=number,
            eos_token_ids=(),
            max_tokens=8,
            queued_ns=0,
        )
        sequence.block_table = pool.allocate(pool.blocks_for(count + 1))
        sequence.num_computed_tokens = count
        sequences.append(sequence)
    return sorted(sequences, key=lambda sequence: sequence.rank)


def ids(sequences: list[Sequence]) -> list[int]:
    return [sequence.sequence_id for sequence in sequences]


def test_the_victim_is_who_has_least_to_compute_again() -> None:
    pool = BlockPool(64, BLOCK_SIZE)
    assert choose_victim(running(pool, 3, 40, 9, 30), pool).sequence_id == 2


def test_among_equals_the_latest_arrival_goes() -> None:
    pool = BlockPool(64, BLOCK_SIZE)
    assert choose_victim(running(pool, 40, 9, 9), pool).sequence_id == 2


def test_shared_blocks_are_not_lost_and_cost_nothing() -> None:
    pool = BlockPool(64, BLOCK_SIZE)
    sequences = running(pool, 40, 20, 30)
    pool.share(sequences[2].block_table[:6])  # 24 of its 30 tokens stay
    assert choose_victim(sequences, pool).sequence_id == 2


def test_the_lowest_priority_goes_whatever_it_costs() -> None:
    pool = BlockPool(64, BLOCK_SIZE)
    assert choose_victim(running(pool, 3, 40, 4, priorities=(1, 0, 1)), pool).sequence_id == 1


def test_the_best_rank_is_spared() -> None:
    pool = BlockPool(64, BLOCK_SIZE)
    assert choose_victim(running(pool, 1, 40), pool).sequence_id == 1


def newcomer(priority: int) -> Sequence:
    waiting = request(9, 8, priority=priority)
    return Sequence(waiting, arrival=9, eos_token_ids=(), max_tokens=8, queued_ns=0)


def victims(
    sequences: list[Sequence], pool: BlockPool, priority: int, *, blocks: int = 0, rows: int = 0
) -> list[int]:
    chosen = victims_for(
        newcomer(priority),
        sequences,
        pool,
        num_blocks=blocks,
        num_rows=rows,
        kept_blocks=frozenset(),
    )
    return ids(chosen)


def test_a_newcomer_takes_the_room_of_lower_priorities_only() -> None:
    pool = BlockPool(64, BLOCK_SIZE)
    sequences = running(pool, 10, 10, 10, priorities=(1, 0, -1))
    assert victims(sequences, pool, 0, blocks=3) == [2]
    assert victims(sequences, pool, 1, blocks=3) == [2]
    assert victims(sequences, pool, 1, blocks=6) == [2, 1]
    assert victims(sequences, pool, 1, rows=1) == [2]
    assert victims(sequences, pool, -1, rows=1) == []


def test_nobody_goes_where_it_would_not_be_enough() -> None:
    pool = BlockPool(64, BLOCK_SIZE)
    sequences = running(pool, 10, 10, 10, priorities=(1, 0, -1))
    assert victims(sequences, pool, 1, blocks=30) == []


def test_nobody_goes_who_is_not_needed_beside_the_others() -> None:
    pool = BlockPool(64, BLOCK_SIZE)
    sequences = running(pool, 4, 4, 30, priorities=(0, 0, 0))
    assert victims(sequences, pool, 1, blocks=8) == [2]


def test_an_urgent_request_takes_the_place_of_a_running_one_that_is_not() -> None:
    scheduler = make_scheduler(max_running_sequences=2)
    scheduler.add([request(0, 4), request(1, 8)])
    step(scheduler)
    scheduler.add([request(2, 4, priority=1)])
    assert step(scheduler) == {2: 4, 1: 1}
    assert scheduler.preemptions == 1


def test_a_request_of_the_same_priority_waits() -> None:
    scheduler = make_scheduler(max_running_sequences=2)
    scheduler.add([request(0, 4), request(1, 8)])
    step(scheduler)
    scheduler.add([request(2, 4)])
    assert step(scheduler) == {0: 1, 1: 1}
    assert scheduler.preemptions == 0


def test_who_comes_back_finds_most_of_what_it_had_computed() -> None:
    scheduler = make_scheduler(max_running_sequences=1, num_blocks=32)
    scheduler.add([request(0, 14, 30)])
    for _ in range(8):
        step(scheduler)  # 21 tokens are computed, 22 known
    scheduler.add([request(1, 4, 3, priority=1)])
    for _ in range(3):
        assert step(scheduler).keys() == {1}
    assert step(scheduler) == {0: 22 - 20}


def test_when_a_sequence_was_preempted_and_resumed_is_known_of_it() -> None:
    scheduler = make_scheduler(max_running_sequences=1, num_blocks=32)
    scheduler.add([request(0, 4, 30)])
    began_ns = now_ns()
    step(scheduler)
    (sequence,) = scheduler.schedule().sequences
    assert sequence.timing().interruptions_ns == []
    for number in range(1, 3):
        scheduler.add([request(number, 4, 2, priority=1)])
        for _ in range(3):
            step(scheduler)
    timing = sequence.timing()
    assert timing.preemptions == 2
    assert len(timing.interruptions_ns) == 4
    assert [began_ns, *timing.interruptions_ns] == sorted([began_ns, *timing.interruptions_ns])


def test_of_many_interruptions_the_first_are_kept() -> None:
    (sequence,) = running(BlockPool(16, BLOCK_SIZE), 3)
    for number in range(MAX_INTERRUPTIONS + 5):
        sequence.interrupt(2 * number)
        sequence.resume(2 * number + 1)
    timing = sequence.timing()
    assert timing.preemptions == MAX_INTERRUPTIONS + 5
    assert timing.interruptions_ns == list(range(2 * MAX_INTERRUPTIONS))


def test_all_finish_however_tight_the_pool() -> None:
    scheduler = make_scheduler(num_blocks=9, max_batch_tokens=8, max_running_sequences=4)
    scheduler.add([request(number, 10, 24, priority=number % 2) for number in range(8)])
    steps = 0
    while scheduler.has_work:
        step(scheduler)
        steps += 1
        assert steps < 2000
    assert scheduler.preemptions > 0


def test_after_a_preemption_fewer_run_and_then_more_again() -> None:
    limit = ConcurrencyLimit(8)
    limit.preempted(5)
    assert limit.limit == 5
    limit.preempted(6)
    assert limit.limit == 5
    for _ in range(32):
        limit.stepped()
    assert limit.limit == 6
    for _ in range(32 * 10):
        limit.stepped()
    assert limit.limit == 8


def test_somebody_may_always_run() -> None:
    limit = ConcurrencyLimit(8)
    limit.preempted(0)
    assert limit.limit == 1


def test_a_pool_too_small_for_all_is_not_fought_over() -> None:
    scheduler = make_scheduler(num_blocks=24, max_batch_tokens=64, max_running_sequences=16)
    scheduler.add([request(number, 8, 24) for number in range(32)])
    while scheduler.has_work:
        step(scheduler)
    # Three times as often without a limit.
    assert scheduler.preemptions <= 12


def test_the_queue_is_bounded_in_sequences_and_in_tokens() -> None:
    limits = QueueLimits(max_sequences=4, max_tokens=100)
    limits.check((3, 90), (1, 10))
    with pytest.raises(QueueFullError, match="4 sequences wait already"):
        limits.check((4, 10), (1, 1))
    with pytest.raises(QueueFullError, match="90 tokens wait already"):
        limits.check((3, 90), (1, 11))
    limits.check((0, 0), (1, 500))  # where nobody waits, it will not get better


def test_choices_of_a_request_count_its_prompt_once() -> None:
    scheduler = make_scheduler(max_running_sequences=1, max_waiting_tokens=20)
    prompt = request(0, 12).prompt_token_ids
    scheduler.add([SequenceRequest(number, prompt) for number in range(4)])
    with pytest.raises(QueueFullError):
        scheduler.add([request(10, 12)])
