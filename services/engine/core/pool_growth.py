"""How much memory a pool of blocks takes only to keep contents for a hit."""

from __future__ import annotations

from collections import OrderedDict

# Of the pool: what is used before anything has shown that keeping more helps.
_FIRST_SHARE = 1 / 4


class PoolGrowth:
    """Learns from what is asked for again how much is worth keeping.

    Where the memory of a block is taken as the block is first used, a pool that uses up its blocks
    before it gives a kept one away ends at its full size whatever it serves. This lets it keep what
    fits `max_touched` blocks. That is doubled whenever contents are asked for that were last used
    long ago, measured in blocks that came to be kept since: half of what may be kept or more. What
    was given away is remembered as well, as far back as the whole pool would have kept it.
    """

    def __init__(self, num_blocks: int) -> None:
        self._num_blocks = num_blocks
        self._num_kept = 0  # so far
        # By hash, the number that was kept before it; longest ago first.
        self._last_used: OrderedDict[bytes, int] = OrderedDict()
        self.max_touched = max(1, int(num_blocks * _FIRST_SHARE))

    def kept(self, block_hash: bytes) -> None:
        """Note that nobody uses these contents any more."""
        self._last_used[block_hash] = self._num_kept
        self._num_kept += 1
        if len(self._last_used) > self._num_blocks:
            self._last_used.popitem(last=False)

    def wanted(self, block_hash: bytes, num_touched: int) -> None:
        """Note that contents are asked for, kept or given away; `num_touched` blocks were used."""
        last_used = self._last_used.pop(block_hash, None)
        if last_used is not None and 2 * (self._num_kept - last_used) >= self.max_touched:
            self.max_touched = min(2 * max(self.max_touched, num_touched), self._num_blocks)
