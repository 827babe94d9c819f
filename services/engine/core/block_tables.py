"""Fills the block tables of sequences: with what is in the KV cache, and with free blocks."""

from __future__ import annotations

from typing import Protocol

from services.engine.core.block_pool import BlockPool
from services.engine.core.prefix_cache import Match, PrefixCache
from services.engine.core.sequence import NO_BLOCK, SavedBlocks, Sequence
from services.engine.core.table_shape import TableShape


class BlockStore(Protocol):
    """Keeps copies of blocks beside the KV cache, by tickets. See HostBlocks."""

    def save(self, blocks: list[int]) -> int | None:
        """Copy blocks; returns their ticket, None where there is no room."""

    def restore(self, ticket: int, blocks: list[int], *, first: int) -> None:
        """Copy what was saved, from its block `first` on, to these blocks."""

    def drop(self, ticket: int) -> None:
        """Forget what was saved."""

    def join(self) -> None:
        """Have what is computed from here on come behind the copies so far."""


class BlockTables:
    """Gives sequences their blocks and takes them back.

    A sequence only ever writes to blocks that it alone holds: what it shares is full and computed,
    and a block that it shares in part is copied when it enters.

    A sequence enters with all blocks that it is going to need at a time for what it knows. Of
    groups with a window these are fewer than it has rows: as it computes its prompt, it gives back
    what has slid out, and takes as much for what comes.
    """

    def __init__(
        self,
        pool: BlockPool,
        prefix_cache: PrefixCache,
        shape: TableShape,
        store: BlockStore | None = None,
    ) -> None:
        """store: of what preempted sequences have computed. Without it, and where groups have
        windows, they compute it again."""
        self.pool = pool
        self.store = store if shape.is_plain else None
        self.prefix_cache = prefix_cache
        self.shape = shape
        self._num_groups = shape.num_groups
        self.queried_tokens = 0  # of all sequences that entered, re-entries included
        self.hit_tokens = 0  # of these, found in the KV cache

    def match(self, sequence: Sequence) -> Match:
        """What of a waiting sequence is in the KV cache already."""
        if sequence.saved is not None:
            # What was saved begins with a whole block too.
            return self.prefix_cache.match(sequence, whole_blocks=True)
        original = sequence.fork_of
        if original is not None and original.num_computed_tokens >= sequence.num_tokens:
            match = Match.of(original.block_table, sequence.num_tokens - 1, self.shape)
            if match is not None:
                return match
        return self.prefix_cache.match(sequence)

    def match_whole_blocks(self, sequence: Sequence, match: Match) -> Match:
        """As much of `match`, which is that of `sequence`, as there is without a copy."""
        if not match.copied_blocks:
            return match
        if self.shape.slidings:
            # What ends sooner sees more of what comes before.
            return self.prefix_cache.match(sequence, whole_blocks=True)
        return match.without_copy(self.pool.block_size)

    def blocks_to_enter(self, sequence: Sequence, match: Match) -> int:
        """By how many blocks fewer are free once `sequence` has entered with `match`."""
        return self._missing_to_enter(sequence, match) + self.pool.count_kept(match.held_blocks)

    def enter(self, sequence: Sequence, match: Match) -> list[tuple[int, int]]:
        """Make the block table of a sequence, for all tokens it knows.

        Returns the blocks (source, destination) to copy before anything is computed. The sources
        are held for the copy's sake, and are to be released once it has been made.
        """
        self.pool.share(match.held_blocks)
        taken = self.pool.allocate(self._missing_to_enter(sequence, match))
        sequence.block_table = match.blocks + taken
        sequence.num_computed_tokens = match.num_tokens
        if self.shape.slidings:
            end = self.shape.rows_for(match.num_tokens + 1) * self._num_groups
            sequence.reserved_blocks = sequence.block_table[end:]
            del sequence.block_table[end:]
            sequence.slid_ends = [
                sliding.slid_end(match.num_tokens) for sliding in self.shape.slidings
            ]
        self.prefix_cache.adopt(sequence, match)
        if sequence.admissions == 0:
            sequence.cached_prompt_tokens = min(match.num_tokens, sequence.num_prompt_tokens)
        self.queried_tokens += sequence.num_tokens
        self.hit_tokens += match.num_tokens
        if sequence.saved is not None:
            self._restore(sequence)
        copies = sequence.block_table[len(match.blocks) :] if match.copied_blocks else []
        return list(zip(match.copied_blocks, copies, strict=False))

    def missing_blocks(self, sequence: Sequence, num_draft_tokens: int) -> int:
        """Blocks that the table of a running sequence lacks for what it expects and so many drafted
        tokens."""
        num_tokens = sequence.num_expected_tokens + num_draft_tokens
        return self.pool.blocks_for(num_tokens) * self._num_groups - len(sequence.block_table)

    def lacking_blocks(self, sequence: Sequence, end: int) -> int:
        """Take back what a running sequence sees no longer; returns how many free blocks it takes
        for its table to reach `end` tokens, and then all that it expects."""
        if not self.shape.slidings:
            return self.missing_blocks(sequence, end - sequence.num_expected_tokens)
        self._slide(sequence)
        end = max(end, sequence.num_expected_tokens)
        needed = self.shape.blocks_for(end, sequence.num_computed_tokens)
        held = len(sequence.block_table) + len(sequence.reserved_blocks)
        for sliding, slid_end in zip(self.shape.slidings, sequence.slid_ends, strict=True):
            held -= len(sliding.groups) * (slid_end - sliding.kept_rows)
        return needed - held

    def grow(self, sequence: Sequence, end: int, num_blocks: int) -> None:
        """Let the table of a running sequence reach `end` tokens, with the help of `num_blocks`
        free blocks, which are what it lacks."""
        table, reserved = sequence.block_table, sequence.reserved_blocks
        if not self.shape.slidings:
            table += self.pool.allocate(num_blocks)
            return
        reserved += self.pool.allocate(num_blocks)
        num_added = max(0, self.pool.blocks_for(end) * self._num_groups - len(table))
        table += reserved[:num_added]
        del reserved[:num_added]

    def save(self, sequence: Sequence) -> None:
        """Keep what a running sequence has computed for when it comes back, if there is room."""
        num_tokens = sequence.num_computed_tokens
        if self.store is None or num_tokens == 0:
            return
        ticket = self.store.save(sequence.block_table[: self.pool.blocks_for(num_tokens)])
        if ticket is not None:
            sequence.saved = SavedBlocks(ticket, num_tokens)

    def forget(self, sequence: Sequence) -> None:
        """Drop what was saved of a sequence that does not come back."""
        if sequence.saved is not None and self.store is not None:
            self.store.drop(sequence.saved.ticket)
            sequence.saved = None

    def _restore(self, sequence: Sequence) -> None:
        saved, found = sequence.saved, sequence.num_computed_tokens
        assert saved is not None
        assert self.store is not None
        if saved.num_tokens > found:
            first, end = found // self.pool.block_size, self.pool.blocks_for(saved.num_tokens)
            self.store.restore(saved.ticket, sequence.block_table[first:end], first=first)
            sequence.num_computed_tokens = saved.num_tokens
        self.forget(sequence)

    def leave(self, sequence: Sequence) -> None:
        """Take all blocks of a sequence back; those that were published are kept for a hit."""
        self.pool.release(sequence.held_blocks)
        sequence.block_table = []
        sequence.reserved_blocks = []
        sequence.slid_ends = []
        sequence.retired_blocks = []
        sequence.num_computed_tokens = 0
        sequence.num_launched_tokens = 0
        sequence.num_pending_tokens = 0
        sequence.num_published_rows = 0

    def _missing_to_enter(self, sequence: Sequence, match: Match) -> int:
        needed = self.shape.blocks_for(sequence.num_tokens, match.num_tokens)
        return needed - len(match.blocks) + match.blocks.count(NO_BLOCK)

    def _slide(self, sequence: Sequence) -> None:
        width, table = self._num_groups, sequence.block_table
        for index, sliding in enumerate(self.shape.slidings):
            begin = sequence.slid_ends[index]
            end = sliding.slid_end(sequence.num_computed_tokens)
            for group in sliding.groups if begin < end else ():
                rows = slice(begin * width + group, end * width, width)
                self.prefix_cache.retire(sequence, group, begin, table[rows])
                table[rows] = [NO_BLOCK] * (end - begin)
            sequence.slid_ends[index] = end
