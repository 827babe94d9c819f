"""Fills the block tables of sequences: with what is in the KV cache, and with free blocks."""

from __future__ import annotations

from services.engine.core.block_pool import BlockPool
from services.engine.core.prefix_cache import Match, PrefixCache
from services.engine.core.sequence import Sequence


class BlockTables:
    """Gives sequences their blocks and takes them back.

    A sequence only ever writes to blocks that it alone holds: what it shares is full and computed,
    and a block that it shares in part is copied when it enters.
    """

    def __init__(self, pool: BlockPool, prefix_cache: PrefixCache) -> None:
        self.pool = pool
        self.prefix_cache = prefix_cache
        self.queried_tokens = 0  # of all sequences that entered, re-entries included
        self.hit_tokens = 0  # of these, found in the KV cache

    def match(self, sequence: Sequence) -> Match:
        """What of a waiting sequence is in the KV cache already."""
        original = sequence.fork_of
        if original is not None and original.num_computed_tokens >= sequence.num_tokens:
            return Match.of(original.block_table, sequence.num_tokens - 1, self.pool.block_size)
        return self.prefix_cache.match(sequence)

    def blocks_to_enter(self, sequence: Sequence, match: Match) -> int:
        """By how many blocks fewer are free once `sequence` has entered with `match`."""
        missing = self.pool.blocks_for(sequence.num_tokens) - len(match.blocks)
        return missing + self.pool.count_kept(match.held_blocks)

    def enter(self, sequence: Sequence, match: Match) -> tuple[int, int] | None:
        """Make the block table of a sequence, for all tokens it knows.

        Returns the blocks (source, destination) to copy before anything is computed, if any. The
        source is held for the copy's sake, and is to be released once it has been made.
        """
        self.pool.share(match.held_blocks)
        missing = self.pool.blocks_for(sequence.num_tokens) - len(match.blocks)
        sequence.block_table = match.blocks + self.pool.allocate(missing)
        sequence.num_computed_tokens = match.num_tokens
        self.prefix_cache.adopt(sequence, match)
        if sequence.admissions == 0:
            sequence.cached_prompt_tokens = min(match.num_tokens, sequence.num_prompt_tokens)
        self.queried_tokens += sequence.num_tokens
        self.hit_tokens += match.num_tokens
        if match.copied_block is None:
            return None
        return match.copied_block, sequence.block_table[len(match.blocks)]

    def missing_blocks(self, sequence: Sequence, num_draft_tokens: int) -> int:
        """Blocks that a running sequence lacks for what it knows and so many drafted tokens."""
        num_tokens = sequence.num_tokens + num_draft_tokens
        return self.pool.blocks_for(num_tokens) - len(sequence.block_table)

    def leave(self, sequence: Sequence) -> None:
        """Take all blocks of a sequence back; those that were published are kept for a hit."""
        self.pool.release(sequence.block_table)
        sequence.block_table = []
        sequence.num_computed_tokens = 0
        sequence.num_published_blocks = 0
