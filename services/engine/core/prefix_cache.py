"""Finds what of a sequence is in the KV cache already, by the hashes of its blocks.

A block is known by a hash of its tokens and of the hash of the block before it, hence of all that
its keys and values depend on. The first block's predecessor is the root: a keyed hash of whatever
else decides contents or visibility (tenant, salt, adapter). Sequences of two tenants have different
roots, so neither ever hits the other's blocks, and nobody learns another's prompt from how fast an
answer starts. The key is drawn anew by each process and never leaves it: without it nobody can
search for two prompts whose hashes collide.
"""

from __future__ import annotations

import secrets
from dataclasses import dataclass
from hashlib import blake2b
from itertools import chain

from services.engine.core.block_pool import BlockPool
from services.engine.core.errors import IntegrityError
from services.engine.core.sequence import NO_BLOCK, Sequence
from services.engine.core.table_shape import TableShape

# 128 bits: of 2**40 blocks, two collide by chance with a probability of 2**-49.
_HASH_BYTES = 16


@dataclass(frozen=True, slots=True)
class Match:
    """What of a sequence the KV cache holds: its first `num_tokens` tokens.

    `blocks` are the rows of a block table that are full and shared as they are; those that the
    tokens to follow do not see are absent. The rest of the tokens, if any, lie in the beginning of
    `copied_blocks`, one of each group, which the sequence is going to write to and therefore
    copies.
    """

    blocks: list[int]
    copied_blocks: list[int]
    num_tokens: int

    @classmethod
    def of(cls, table: list[int], num_tokens: int, shape: TableShape) -> Match | None:
        """The match of the first `num_tokens` tokens that the rows of `table` hold; None where it
        lacks a block that is seen."""
        full, rest = divmod(num_tokens, shape.block_size)
        width = shape.num_groups
        blocks = table[: full * width]
        for sliding in shape.slidings:
            begin, end = sliding.kept_rows, sliding.slid_end(num_tokens)
            for group in sliding.groups:
                column = blocks[group::width]
                if NO_BLOCK in column[:begin] or NO_BLOCK in column[end:]:
                    return None
                slid = slice(begin * width + group, end * width, width)
                blocks[slid] = [NO_BLOCK] * (end - begin)
        copied = table[full * width : (full + 1) * width] if rest else []
        return None if NO_BLOCK in copied else cls(blocks, copied, num_tokens)

    @property
    def held_blocks(self) -> list[int]:
        """The blocks that must not go to anybody else until the copy is made."""
        blocks = self.blocks
        if NO_BLOCK in blocks:
            blocks = [block for block in blocks if block != NO_BLOCK]
        return [*blocks, *self.copied_blocks] if self.copied_blocks else blocks

    def without_copy(self, block_size: int) -> Match:
        """The same match, its full blocks only, where no group has a window."""
        return Match(self.blocks, [], self.num_tokens - self.num_tokens % block_size)


class PrefixCache:
    """Publishes the blocks that sequences have computed and finds them for others.

    A sequence hashes each of its blocks once. Nothing is done per token: in decode, one block in
    `block_size` steps is hashed and published, in about a microsecond.
    """

    def __init__(self, pool: BlockPool, shape: TableShape, *, enabled: bool = True) -> None:
        self.enabled = enabled
        self._pool = pool
        self._shape = shape
        self._key = secrets.token_bytes(32)

    def match(self, sequence: Sequence, *, whole_blocks: bool = False) -> Match:
        """The longest prefix of `sequence` that published blocks hold.

        At least one token is left to compute: only that gives the logits to sample from. Of a
        prompt that is to be scored, all are left whose logits say something new. Of groups with a
        window, only what the tokens that are left see need be there.

        whole_blocks: whether it is to end where a block does.
        """
        size = self._pool.block_size
        most_tokens = sequence.most_cached_tokens
        if whole_blocks:
            most_tokens -= most_tokens % size
        blocks: list[int] = []
        if self.enabled and not self._shape.is_plain:
            blocks = self._find_rows(self.known_hashes(sequence), most_tokens)
        elif self.enabled:
            for block_hash in self.known_hashes(sequence):
                block = self._pool.find(block_hash)
                if block is None:
                    break
                blocks.append(block)
        num_tokens = min(len(blocks) // self._shape.num_groups * size, most_tokens)
        match = Match.of(blocks, num_tokens, self._shape)
        assert match is not None, "what is seen of the rows that were found is there"
        return match

    def known_hashes(self, sequence: Sequence) -> list[bytes]:
        """The hashes of all blocks that the known tokens of `sequence` fill."""
        self._hash_blocks(sequence, sequence.num_tokens // self._pool.block_size)
        return sequence.block_hashes

    def adopt(self, sequence: Sequence, match: Match) -> None:
        """Note that `sequence` begins with the blocks of `match`, which are published."""
        if self.enabled:
            sequence.num_published_rows = match.num_tokens // self._pool.block_size
            self._hash_blocks(sequence, sequence.num_published_rows)

    def publish(self, sequence: Sequence) -> None:
        """Let the blocks be found that `sequence` has filled with computed tokens.

        To be called only once a sampled token has shown that what was computed is sound: a
        sequence that fails must leave nothing behind for others to trip over.
        """
        computed = min(sequence.num_computed_tokens, len(sequence.token_ids))
        full = computed // self._pool.block_size
        if full <= sequence.num_published_rows or not self.enabled:
            return
        self._hash_blocks(sequence, full)
        if self._shape.is_plain:
            for index in range(sequence.num_published_rows, full):
                self._pool.publish(sequence.block_table[index], sequence.block_hashes[index])
        else:
            self._publish_rows(sequence, full)
        sequence.num_published_rows = full

    def retire(self, sequence: Sequence, group: int, first_row: int, blocks: list[int]) -> None:
        """Take back blocks of a group of `sequence`, those of consecutive rows that have slid out
        of its window.

        What has not been published may be found once the sequence publishes what follows.
        """
        num_published = max(0, sequence.num_published_rows - first_row) if self.enabled else None
        self._pool.release(blocks[:num_published])
        if num_published is None or num_published >= len(blocks):
            return
        self._hash_blocks(sequence, first_row + len(blocks))
        unpublished = blocks[num_published:]
        hashes = sequence.block_hashes[first_row + num_published : first_row + len(blocks)]
        for block, block_hash in zip(unpublished, hashes, strict=True):
            key = _key(block_hash, group)
            self._pool.retire(block, key)
            sequence.retired_blocks.append((block, key))

    def check_integrity(self, sequence: Sequence) -> None:
        """Check that the blocks of a running sequence are found by no hash but their own.

        Raises:
            IntegrityError: one is, or one that must not be found yet can be.
        """
        for index, block in enumerate(sequence.block_table):
            if block == NO_BLOCK:
                continue
            row, group = divmod(index, self._shape.num_groups)
            found_by = self._pool.hash_of(block)
            published = row < sequence.num_published_rows
            own = _key(sequence.block_hashes[row], group) if published else None
            if found_by is not None and found_by != own:
                raise IntegrityError(
                    f"block {row} of sequence {sequence.sequence_id} is found by a wrong hash"
                )

    def _find_rows(self, hashes: list[bytes], most_tokens: int) -> list[int]:
        """The rows of the longest match, of at most so many tokens: of groups with a window, those
        blocks that tokens behind its end see."""
        shape = self._shape
        num_rows = min(len(hashes), shape.rows_for(most_tokens))
        columns: dict[int, list[int]] = {}
        for group in shape.full_groups:
            column = columns[group] = []
            for block_hash in hashes[:num_rows]:
                block = self._pool.find(_key(block_hash, group))
                if block is None:
                    break
                column.append(block)
            num_rows = len(column)
        seen: dict[tuple[int, int], int] = {}  # by row and group
        while (missing := self._missing_row(hashes, num_rows, most_tokens, seen)) is not None:
            # A match that ends later sees that row as well, as long as it sees the rows behind it.
            num_rows = missing
        width = shape.num_groups
        rows = [NO_BLOCK] * (num_rows * width)
        for group, column in columns.items():
            rows[group::width] = column[:num_rows]
        for (row, group), block in seen.items():
            if row < num_rows:
                rows[row * width + group] = block
        return rows

    def _missing_row(
        self, hashes: list[bytes], num_rows: int, most_tokens: int, seen: dict[tuple[int, int], int]
    ) -> int | None:
        """The last of the rows that a match of `num_rows` rows has to have and that lacks a block;
        adds those that are there to `seen`."""
        num_tokens = min(num_rows * self._pool.block_size, most_tokens)
        for sliding in self._shape.slidings:
            near = range(num_rows - 1, sliding.slid_end(num_tokens) - 1, -1)
            kept = range(min(sliding.kept_rows, num_rows) - 1, -1, -1)
            for row in chain(near, kept):
                for group in sliding.groups:
                    if (row, group) in seen:
                        continue
                    block = self._pool.find(_key(hashes[row], group))
                    if block is None:
                        return row
                    seen[row, group] = block
        return None

    def _publish_rows(self, sequence: Sequence, end: int) -> None:
        width = self._shape.num_groups
        for row in range(sequence.num_published_rows, end):
            for group, block in enumerate(sequence.block_table[row * width : (row + 1) * width]):
                if block != NO_BLOCK:
                    self._pool.publish(block, _key(sequence.block_hashes[row], group))
        for block, key in sequence.retired_blocks:
            self._pool.publish_retired(block, key)
        sequence.retired_blocks = []

    def _hash_blocks(self, sequence: Sequence, num_blocks: int) -> None:
        hashes = sequence.block_hashes
        if len(hashes) >= num_blocks:
            return
        size = self._pool.block_size
        tokens = sequence.token_ids[len(hashes) * size : num_blocks * size].tobytes()
        width = len(tokens) // (num_blocks - len(hashes))
        parent = hashes[-1] if hashes else self._root(sequence)
        for start in range(0, len(tokens), width):
            parent = blake2b(
                parent + tokens[start : start + width], digest_size=_HASH_BYTES
            ).digest()
            hashes.append(parent)

    def _root(self, sequence: Sequence) -> bytes:
        request, adapter = sequence.request, sequence.adapter
        tenant = request.tenant.encode()
        # Not by its name, which another one may have had.
        generation = 0 if adapter is None else adapter.generation
        numbers = generation.to_bytes(8, "little") + len(tenant).to_bytes(8, "little")
        # The length keeps ("ab", "c") apart from ("a", "bc").
        name = numbers + tenant + request.cache_salt
        return blake2b(name, digest_size=_HASH_BYTES, key=self._key).digest()


def _key(block_hash: bytes, group: int) -> bytes:
    """By what a block of a group is known, among those of its row."""
    return block_hash + group.to_bytes(2) if group else block_hash
