"""A pool takes memory to keep more where that helps, and only there."""

from __future__ import annotations

import heapq
import random

from services.engine.core.block_pool import BlockPool
from services.engine.core.pool_growth import PoolGrowth

NUM_BLOCKS = 128
QUARTER = NUM_BLOCKS // 4


def growing_pool(num_blocks: int = NUM_BLOCKS) -> BlockPool:
    return BlockPool(num_blocks, 16, PoolGrowth(num_blocks))


def enter(pool: BlockPool, contents: list[bytes]) -> tuple[list[int], int]:
    """The blocks of a sequence that computes these contents, and how many of them it found."""
    found: list[int] = []
    for block_hash in contents:
        block = pool.find(block_hash)
        if block is None:
            break
        found.append(block)
    pool.share(found)
    table = found + pool.allocate(len(contents) - len(found))
    for block, block_hash in zip(table, contents, strict=True):
        pool.publish(block, block_hash)
    return table, len(found)


def serve(pool: BlockPool, contents: list[bytes]) -> int:
    """Compute these contents and leave; returns how many blocks of them were found."""
    table, num_found = enter(pool, contents)
    pool.release(table)
    pool.check_integrity([])
    return num_found


def prompt(name: int, num_blocks: int) -> list[bytes]:
    return [f"{name}, {index}".encode() for index in range(num_blocks)]


def test_prompts_that_nobody_asks_for_again_take_a_quarter() -> None:
    pool = growing_pool()
    for name in range(100):
        assert serve(pool, prompt(name, 5)) == 0
    assert pool.num_touched == QUARTER


def test_a_prefix_that_all_share_takes_a_quarter() -> None:
    pool = growing_pool()
    system_prompt = prompt(-1, 8)
    for name in range(100):
        assert serve(pool, system_prompt + prompt(name, 5)) == (8 if name else 0)
    assert pool.num_touched == QUARTER


def test_those_who_run_take_what_they_need() -> None:
    pool = growing_pool()
    table, _ = enter(pool, prompt(0, 100))
    assert pool.num_touched == 100
    pool.release(table)
    pool.allocate(NUM_BLOCKS)
    assert pool.num_touched == NUM_BLOCKS


def test_what_comes_back_after_long_makes_room_before_it_is_given_away() -> None:
    pool = growing_pool()
    serve(pool, prompt(0, 5))
    serve(pool, prompt(1, QUARTER // 2))
    assert serve(pool, prompt(0, 5)) == 5
    serve(pool, prompt(2, QUARTER))
    assert serve(pool, prompt(1, QUARTER // 2)) == QUARTER // 2


def test_conversations_that_come_back_in_turn_are_lost_once_at_most() -> None:
    pool = growing_pool()
    turns = [[serve(pool, prompt(name, 8)) for name in range(16)] for _ in range(3)]
    # A quarter holds four of them.
    assert turns == [[0] * 16, [0] * 12 + [8] * 4, [8] * 16]


def test_conversations_find_what_they_would_in_a_pool_that_keeps_all() -> None:
    """People think for a minute on average, some much less: those show in time what it takes."""
    assert _cached_blocks(BlockPool(1000, 16)) == _cached_blocks(growing_pool(1000))


def _cached_blocks(pool: BlockPool) -> int:
    """Ten new conversations a minute for an hour, of six turns of 10 to 40 blocks."""
    draw = random.Random(1)
    arrivals = [(draw.uniform(0, 3600), name, 0, 0) for name in range(600)]  # time, name, turn, old
    heapq.heapify(arrivals)
    cached = 0
    while arrivals:
        now_s, name, turn, known = heapq.heappop(arrivals)
        known += draw.randint(10, 40)
        cached += serve(pool, prompt(name, known))
        if turn < 5:
            later_s = now_s + draw.expovariate(1 / 60)
            heapq.heappush(arrivals, (later_s, name, turn + 1, known))
    return cached
