"""Who gives its blocks back when the pool is full, and who may ask for that.

A preempted sequence keeps its tokens, its priority and its arrival. Its published blocks stay in
the prefix cache as long as there is room, so that most of it is found again when it comes back.

Progress: the sequence of the best rank (priority, then arrival) among those running is never
preempted but for one of a higher priority, so it computes in every step. Only finitely many
sequences of a priority rank before a given one, so each gets there and, since none is accepted
that the whole pool could not hold, finishes, as long as higher priorities leave it room.
"""

from __future__ import annotations

from services.engine.core.block_pool import BlockPool
from services.engine.core.sequence import NO_BLOCK, Sequence


def choose_victim(running: list[Sequence], pool: BlockPool, num_groups: int = 1) -> Sequence:
    """Whom to preempt so that one of `running` (best rank first) can go on.

    It is the cheapest of the lowest priority: the one with the fewest tokens to compute again,
    counted as if none of its own blocks survived in the prefix cache (at worst, none does). Among
    equals the latest arrival goes. The best rank is spared as long as it is not alone.

    num_groups: blocks in a row of a block table.
    """
    return _cheapest(running[1:] or running, pool, num_groups)


def victims_for(
    newcomer: Sequence,
    running: list[Sequence],
    pool: BlockPool,
    *,
    num_blocks: int,
    num_rows: int,
    kept_blocks: frozenset[int],
    num_groups: int = 1,
) -> list[Sequence]:
    """Whom to preempt so that `newcomer`, who waits, gets `num_blocks` free blocks more and
    `num_rows` rows more; `kept_blocks` are those it is going to share, so they free nothing.

    Only sequences of a lower priority are in question, the lowest first. The list is empty where
    they could not make enough room, for then nobody needs to go.
    """
    # One row was kept free for the victim itself (see RunningSet), besides its own.
    freed = {
        each: num_groups
        + pool.count_sole(block for block in each.held_blocks if block not in kept_blocks)
        for each in running
        if each.priority < newcomer.priority
    }
    victims: list[Sequence] = []
    while len(victims) < len(freed) and (num_blocks > 0 or len(victims) < num_rows):
        victims.append(_cheapest([each for each in freed if each not in victims], pool, num_groups))
        num_blocks -= freed[victims[-1]]
    if num_blocks > 0 or len(victims) < num_rows:
        return []
    for victim in tuple(victims):
        # Cheap ones chosen first may not be needed beside a large one chosen last.
        if num_blocks + freed[victim] <= 0 and len(victims) > num_rows:
            victims.remove(victim)
            num_blocks += freed[victim]
    return victims


def _cheapest(candidates: list[Sequence], pool: BlockPool, num_groups: int) -> Sequence:
    lowest = min(sequence.priority for sequence in candidates)
    return min(
        (sequence for sequence in candidates if sequence.priority == lowest),
        key=lambda sequence: (tokens_to_recompute(sequence, pool, num_groups), -sequence.arrival),
    )


def tokens_to_recompute(sequence: Sequence, pool: BlockPool, num_groups: int) -> int:
    """What preempting costs at most: computed tokens that come after the last blocks that others
    hold too, as the first group of layers has them."""
    column = sequence.block_table[::num_groups]
    num_shared = len(column)
    while num_shared:
        block = column[num_shared - 1]
        if block != NO_BLOCK and not pool.count_sole((block,)):
            break
        num_shared -= 1
    return max(0, sequence.num_computed_tokens - num_shared * pool.block_size)
