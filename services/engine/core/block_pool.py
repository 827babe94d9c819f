"""The pool of KV cache blocks: who owns which, and which are free."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

from services.engine.core.errors import IntegrityError, OutOfBlocksError


class BlockPool:
    """Hands out the blocks [0, num_blocks) of the paged KV cache (PagedAttention, 2309.06180).

    Ownership: a block is either free (in the pool's free list) or owned by exactly one block
    table, from the `allocate` that returned it up to the `release` that takes it back. The pool
    never looks into the cache itself: a freshly allocated block holds whatever its last owner
    wrote, and readers must not look past a sequence's context length.
    """

    def __init__(self, num_blocks: int, block_size: int) -> None:
        if num_blocks < 1 or block_size < 1:
            raise ValueError(f"a pool of {num_blocks} blocks of {block_size} tokens holds nothing")
        self.num_blocks = num_blocks
        self.block_size = block_size
        # A stack: the block freed last is the one most likely still in a hardware cache.
        self._free = list(range(num_blocks - 1, -1, -1))
        self._is_free = bytearray(b"\x01") * num_blocks

    @property
    def num_free(self) -> int:
        """Blocks nobody owns."""
        return len(self._free)

    @property
    def num_used(self) -> int:
        """Blocks owned by block tables."""
        return self.num_blocks - len(self._free)

    def blocks_for(self, num_tokens: int) -> int:
        """Blocks it takes to hold `num_tokens` tokens."""
        return -(-num_tokens // self.block_size)

    def allocate(self, count: int) -> list[int]:
        """Take `count` free blocks; the caller owns them until it releases them.

        Raises:
            OutOfBlocksError: fewer than `count` blocks are free; nothing was taken.
        """
        if count > len(self._free):
            raise OutOfBlocksError(f"{count} blocks wanted, {len(self._free)} free")
        if count == 0:
            return []
        taken = self._free[-count:][::-1]
        del self._free[-count:]
        for block in taken:
            self._is_free[block] = 0
        return taken

    def release(self, blocks: Iterable[int]) -> None:
        """Give blocks back; the caller no longer owns them.

        Raises:
            IntegrityError: a block was free already (two owners, or released twice).
        """
        for block in blocks:
            if self._is_free[block]:
                raise IntegrityError(f"block {block} was released twice")
            self._is_free[block] = 1
            self._free.append(block)

    def check_integrity(self, block_tables: Iterable[Iterable[int]]) -> None:
        """Check that every block is free or in exactly one of `block_tables`, and not both.

        Raises:
            IntegrityError: a block is lost, shared, or both free and owned.
        """
        owners = np.zeros(self.num_blocks, np.int64)
        for table in block_tables:
            np.add.at(owners, np.fromiter(table, np.int64), 1)
        free = np.zeros(self.num_blocks, np.int64)
        np.add.at(free, np.array(self._free, np.int64), 1)
        if not np.array_equal(free, np.frombuffer(self._is_free, np.uint8)):
            raise IntegrityError("the free list and the free marks of the block pool differ")
        wrong = np.flatnonzero(owners + free != 1)
        if wrong.size:
            block = int(wrong[0])
            raise IntegrityError(
                f"{wrong.size} blocks are lost or shared; block {block} is "
                f"{int(free[block])} times free and has {int(owners[block])} owners"
            )
