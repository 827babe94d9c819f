"""How many blocks of the KV cache a sequence needs, and which of them it needs no longer."""

from __future__ import annotations

from bisect import bisect_right
from dataclasses import dataclass, field

from services.engine.core.model_config import SparseAttention, Window


@dataclass(frozen=True, slots=True)
class Sliding:
    """Groups of layers that see the same window, and perhaps the beginning beside it.

    Attributes:
        window: how many tokens back a token sees, its own included.
        kept_rows: how many rows of the beginning it sees wherever it is.
        groups: their indices.
        most_blocks: that a sequence needs for one of them at a time: they hold all that the tokens
            of a step see.
    """

    window: int
    kept_rows: int
    groups: tuple[int, ...]
    most_blocks: int
    block_size: int

    def slid_end(self, num_computed_tokens: int) -> int:
        """The end of the rows, from `kept_rows` on, that no token yet to be computed sees."""
        first_seen = max(0, num_computed_tokens - self.window + 1) // self.block_size
        return max(first_seen, self.kept_rows)

    def num_slid(self, num_computed_tokens: int) -> int:
        """How many rows that makes."""
        return self.slid_end(num_computed_tokens) - self.kept_rows


@dataclass(frozen=True, slots=True)
class TableShape:
    """What a block table looks like.

    A sequence has a row of blocks for each `block_size` of its tokens, one block for each group of
    layers, in the order of the groups. Of a group with a window, the blocks of rows that have slid
    out of it are given back, but for those of the beginning where tokens see that as well.

    Attributes:
        windows: of each group, as LayerGroups has them.
        chunk_tokens: the most tokens of a sequence that a step computes.
        full_groups: indices of the groups that see all.
        slidings: the others, by their window.
    """

    block_size: int
    windows: tuple[Window | None, ...] = (None,)
    chunk_tokens: int = 1
    full_groups: tuple[int, ...] = field(init=False)
    slidings: tuple[Sliding, ...] = field(init=False)

    def __post_init__(self) -> None:
        groups: dict[Window | None, list[int]] = {}
        for group, window in enumerate(self.windows):
            groups.setdefault(window, []).append(group)
        object.__setattr__(self, "full_groups", tuple(groups.pop(None, [])))
        slidings = tuple(
            self._sliding(window, tuple(own))
            for window, own in groups.items()
            if window is not None
        )
        object.__setattr__(self, "slidings", slidings)

    @classmethod
    def of_steps(
        cls, block_size: int, windows: tuple[Window | None, ...], max_batch_tokens: int
    ) -> TableShape:
        """The shape of tables for steps of up to `max_batch_tokens` tokens."""
        # Where the next step is planned before this one is computed, one token more.
        return cls(block_size, windows, max_batch_tokens + 1)

    @property
    def num_groups(self) -> int:
        """Blocks of a row."""
        return len(self.windows)

    @property
    def is_plain(self) -> bool:
        """Whether there is one group, which sees all."""
        return self.windows == (None,)

    def rows_for(self, num_tokens: int) -> int:
        """Rows that so many tokens take."""
        return -(-num_tokens // self.block_size)

    def blocks_for(self, num_tokens: int, num_computed_tokens: int = 0) -> int:
        """Blocks that a sequence of so many tokens needs until all are computed, where some are."""
        rows = self.rows_for(num_tokens)
        needed = len(self.full_groups) * rows
        for sliding in self.slidings:
            left = rows - sliding.num_slid(num_computed_tokens)
            needed += len(sliding.groups) * min(left, sliding.most_blocks)
        return needed

    def most_tokens(self, num_blocks: int, limit: int) -> int:
        """Tokens that a sequence can have in a pool of so many blocks, `limit` at most."""
        rows = range(1, self.rows_for(limit) + 1)
        fitting = bisect_right(
            rows, num_blocks, key=lambda count: self.blocks_for(count * self.block_size)
        )
        return min(limit, fitting * self.block_size)

    def _sliding(self, window: Window, groups: tuple[int, ...]) -> Sliding:
        kept_rows = 0
        if isinstance(window, SparseAttention):
            kept_rows = self.rows_for(window.global_tokens)
            window = window.window
        tokens = window - 1 + self.chunk_tokens
        # Wherever the first of them is in its block.
        most_blocks = (tokens + self.block_size - 2) // self.block_size + 1
        return Sliding(window, kept_rows, groups, kept_rows + most_blocks, self.block_size)
