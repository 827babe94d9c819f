"""Blocks are owned once, and what breaks that is found."""

from __future__ import annotations

import pytest

from services.engine.core.block_pool import BlockPool
from services.engine.core.errors import IntegrityError, OutOfBlocksError


def test_blocks_are_handed_out_once_and_come_back() -> None:
    pool = BlockPool(8, 16)
    first, second = pool.allocate(5), pool.allocate(3)
    assert sorted(first + second) == list(range(8))
    pool.check_integrity([first, second])
    with pytest.raises(OutOfBlocksError):
        pool.allocate(1)
    pool.release(first)
    assert pool.num_free == 5
    pool.check_integrity([second])


def test_asking_for_too_many_takes_none() -> None:
    pool = BlockPool(4, 16)
    with pytest.raises(OutOfBlocksError):
        pool.allocate(5)
    assert pool.num_free == 4


@pytest.mark.parametrize(("tokens", "blocks"), [(0, 0), (1, 1), (16, 1), (17, 2)])
def test_tokens_round_up_to_blocks(tokens: int, blocks: int) -> None:
    assert BlockPool(4, 16).blocks_for(tokens) == blocks


def test_releasing_twice_is_found() -> None:
    pool = BlockPool(4, 16)
    blocks = pool.allocate(2)
    pool.release(blocks)
    with pytest.raises(IntegrityError):
        pool.release(blocks[:1])


def test_lost_and_shared_blocks_are_found() -> None:
    pool = BlockPool(4, 16)
    blocks = pool.allocate(2)
    with pytest.raises(IntegrityError, match="lost or shared"):
        pool.check_integrity([])
    with pytest.raises(IntegrityError, match="lost or shared"):
        pool.check_integrity([blocks, blocks])
    pool.check_integrity([blocks])


def test_a_pool_that_holds_nothing_is_refused() -> None:
    with pytest.raises(ValueError, match="holds nothing"):
        BlockPool(0, 16)
