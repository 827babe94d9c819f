"""The pool of KV cache blocks: who holds which, which are free, and which are kept for a hit."""

from __future__ import annotations

from array import array
from collections import OrderedDict
from collections.abc import Iterable, Sequence

import numpy as np

from services.engine.core.errors import IntegrityError, OutOfBlocksError
from services.engine.core.pool_growth import PoolGrowth


class BlockPool:
    """Hands out the blocks [0, num_blocks) of the paged KV cache (PagedAttention, 2309.06180).

    A block is always in one of three states:
      - held: `allocate` or `share` gave it to one or more holders, each of whom releases it once;
      - kept: nobody holds it, but a hash says what it contains, so that it may be shared again;
        it counts as free, and when no other block is, the one longest unused is given away;
        a `growth` may have it given away before blocks that were never used;
      - free: nobody holds it and nobody knows what it contains.

    A block that has a hash is full, and nobody writes to it until it is handed out anew. It can be
    found by it, unless it was retired, and not yet published since. The pool
    never looks into the cache itself: a freshly allocated block holds whatever its last owner
    wrote, and readers must not look past a sequence's context length.
    """

    def __init__(self, num_blocks: int, block_size: int, growth: PoolGrowth | None = None) -> None:
        """growth: for a cache whose memory is taken as its blocks are first used."""
        if num_blocks < 1 or block_size < 1:
            raise ValueError(f"a pool of {num_blocks} blocks of {block_size} tokens holds nothing")
        self.num_blocks = num_blocks
        self.block_size = block_size
        self._growth = growth
        # A stack: the block freed last is the one most likely still in a hardware cache. Those
        # that were never used are at its bottom.
        self._free = list(range(num_blocks - 1, -1, -1))
        self._num_untouched = num_blocks
        self._kept: OrderedDict[int, None] = OrderedDict()  # longest unused first
        self._holders = array("q", bytes(8 * num_blocks))
        self._hashes: list[bytes | None] = [None] * num_blocks
        self._by_hash: dict[bytes, int] = {}

    @property
    def num_free(self) -> int:
        """Blocks nobody holds, kept ones included."""
        return len(self._free) + len(self._kept)

    @property
    def num_used(self) -> int:
        """Blocks that somebody holds."""
        return self.num_blocks - self.num_free

    @property
    def num_touched(self) -> int:
        """Blocks that were ever handed out."""
        return self.num_blocks - self._num_untouched

    @property
    def num_kept(self) -> int:
        """Blocks nobody holds whose contents are kept for a hit."""
        return len(self._kept)

    def blocks_for(self, num_tokens: int) -> int:
        """Blocks it takes to hold `num_tokens` tokens."""
        return -(-num_tokens // self.block_size)

    def allocate(self, count: int) -> list[int]:
        """Take `count` free blocks; the caller holds them until it releases them.

        Raises:
            OutOfBlocksError: fewer than `count` blocks are free; nothing was taken.
        """
        if count > self.num_free:
            raise OutOfBlocksError(f"{count} blocks wanted, {self.num_free} free")
        if count == 0:
            return []
        for _ in range(self._num_to_give_away(count)):
            block, _ = self._kept.popitem(last=False)
            self._forget(block)
            self._free.append(block)
        taken = self._free[-count:][::-1]
        del self._free[-count:]
        self._num_untouched = min(self._num_untouched, len(self._free))
        for block in taken:
            self._holders[block] = 1
        return taken

    def share(self, blocks: Iterable[int]) -> None:
        """Hold blocks that others hold too, or that were kept. Until released, all only read.

        Raises:
            IntegrityError: a block is free, so that its contents are nobody's.
        """
        for block in blocks:
            if self._holders[block] == 0:
                if block not in self._kept:
                    raise IntegrityError(f"block {block} is free and cannot be shared")
                del self._kept[block]
            self._holders[block] += 1

    def release(self, blocks: Sequence[int]) -> None:
        """Give blocks back, each held by the caller; what has a hash is kept.

        The last one goes first, so that of a prefix the end is given away before the beginning,
        without which the end could not be found.

        Raises:
            IntegrityError: nobody held a block (it was released twice).
        """
        for block in reversed(blocks):
            if self._holders[block] == 0:
                raise IntegrityError(f"block {block} was released twice")
            self._holders[block] -= 1
            if self._holders[block] == 0:
                block_hash = self._hashes[block]
                if block_hash is None:
                    self._free.append(block)
                else:
                    self._keep(block, block_hash)

    def retire(self, block: int, block_hash: bytes) -> None:
        """Give back a full block that the caller alone holds: its contents are kept, but not found
        before they are published.

        Raises:
            IntegrityError: others hold the block, or it has a hash.
        """
        if self._holders[block] != 1 or self._hashes[block] is not None:
            raise IntegrityError(f"block {block} cannot be retired: it is shared or has a hash")
        self._holders[block] = 0
        self._hashes[block] = block_hash
        self._keep(block, block_hash)

    def publish_retired(self, block: int, block_hash: bytes) -> None:
        """Let a block be found that was retired, unless it has been given away since."""
        if block not in self._kept or self._hashes[block] != block_hash:
            return
        if self._by_hash.setdefault(block_hash, block) != block:
            del self._kept[block]
            self._hashes[block] = None
            self._free.append(block)

    def publish(self, block: int, block_hash: bytes) -> None:
        """Let a held, full block be found by its hash.

        Where another block has the same contents, that one stays the one to be found.

        Raises:
            IntegrityError: nobody holds the block, or it has another hash.
        """
        if self._holders[block] == 0 or self._hashes[block] not in (None, block_hash):
            raise IntegrityError(f"block {block} cannot be published: it is free or has a hash")
        if self._by_hash.setdefault(block_hash, block) == block:
            self._hashes[block] = block_hash

    def find(self, block_hash: bytes) -> int | None:
        """The block with these contents, held or kept; None if there is none (any more)."""
        if self._growth is not None:
            self._growth.wanted(block_hash, self.num_touched)
        return self._by_hash.get(block_hash)

    def hash_of(self, block: int) -> bytes | None:
        """The hash by which a block can be found, if it can."""
        return self._hashes[block]

    def count_kept(self, blocks: Iterable[int]) -> int:
        """How many of `blocks` would stop counting as free if they were shared."""
        return sum(self._holders[block] == 0 for block in blocks)

    def count_sole(self, blocks: Iterable[int]) -> int:
        """How many of `blocks` have one holder, so that its release frees them."""
        return sum(self._holders[block] == 1 for block in blocks)

    def check_integrity(self, block_tables: Iterable[Sequence[int]]) -> None:
        """Check that the holders of every block are exactly those of `block_tables` that name it,
        and that each block nobody holds is free or kept once, by what is known of its contents.

        Takes about a millisecond for 10,000 blocks.

        Raises:
            IntegrityError: a block is lost, held too often, or found under a wrong hash.
        """
        named = np.zeros(self.num_blocks, np.int64)
        for table in block_tables:
            np.add.at(named, np.array(table, np.int64), 1)
        holders = np.array(self._holders, np.int64)
        self._raise_if_any(named != holders, "are lost or shared: not held by whom they should be")
        places = (holders > 0).astype(np.int64)
        np.add.at(places, np.array(self._free, np.int64), 1)
        np.add.at(places, np.fromiter(self._kept, np.int64, len(self._kept)), 1)
        self._raise_if_any(places != 1, "are nowhere or in two places of the pool")
        hashed = np.array([block_hash is not None for block_hash in self._hashes])
        free = np.zeros(self.num_blocks, np.bool_)
        free[np.array(self._free, np.int64)] = True
        self._raise_if_any(free & hashed, "are free, but have a hash")
        untouched = range(self.num_blocks - 1, self.num_touched - 1, -1)
        if self._free[: self._num_untouched] != list(untouched):
            raise IntegrityError("the blocks that were never used are not the last to be used")
        kept = np.zeros(self.num_blocks, np.bool_)
        kept[np.fromiter(self._kept, np.int64, len(self._kept))] = True
        self._raise_if_any(kept & ~hashed, "are kept without a hash")
        found = np.zeros(self.num_blocks, np.bool_)
        found[np.fromiter(self._by_hash.values(), np.int64, len(self._by_hash))] = True
        self._raise_if_any(hashed & ~found & ~kept, "have a hash, but are found by none")
        if len(self._by_hash) != np.count_nonzero(found) or any(
            self._hashes[block] != block_hash for block_hash, block in self._by_hash.items()
        ):
            raise IntegrityError("the hash index and the hashes of the blocks differ")

    def _num_to_give_away(self, count: int) -> int:
        """How many kept blocks it takes to allocate `count`."""
        lacking = max(0, count - len(self._free))
        if self._growth is None:
            return lacking
        untouched = count - (len(self._free) - self._num_untouched)
        spared = min(untouched, untouched + self.num_touched - self._growth.max_touched)
        return max(lacking, min(spared, len(self._kept)))

    def _keep(self, block: int, block_hash: bytes) -> None:
        self._kept[block] = None
        if self._growth is not None:
            self._growth.kept(block_hash)

    def _forget(self, block: int) -> None:
        block_hash = self._hashes[block]
        assert block_hash is not None, "only blocks with a hash are kept"
        if self._by_hash.get(block_hash) == block:
            del self._by_hash[block_hash]
        self._hashes[block] = None

    @staticmethod
    def _raise_if_any(wrong: np.ndarray[tuple[int, ...], np.dtype[np.bool_]], what: str) -> None:
        blocks = np.flatnonzero(wrong)
        if blocks.size:
            raise IntegrityError(f"{blocks.size} blocks {what}, block {blocks[0]} for one")
